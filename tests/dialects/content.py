"""What the writers write: layers of MXFP8, tensors of any other kind, a config; and ways to make such contents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxfp8_ops import reference

LAYERS = {
    "model.layers.0.self_attn.q_proj": (96, 128),
    "model.layers.0.self_attn.k_proj": (40, 128),  # rows that are no multiple of 32
    "model.layers.0.mlp.down_proj": (128, 160),  # blocks along K that are no multiple of 4
}
EXPERTS = {
    "model.layers.0.mlp.experts.gate_up_proj": (2, 256, 64),
    "model.layers.0.mlp.experts.down_proj": (2, 64, 128),
}


@dataclass
class Layer:
    """One linear, or all experts of one 3-D tensor."""

    weight: Tensor
    """float8_e4m3fn ``[..., N, K]``"""
    scale: Tensor
    """uint8 ``[..., N, K/32]``"""
    bias: Tensor | None = None


@dataclass
class Content:
    """A checkpoint, whatever its format."""

    layers: dict[str, Layer]
    """By module name; experts in one tensor by parameter name, ``X.experts.gate_up_proj``."""
    plain: dict[str, Tensor] = field(default_factory=dict)
    """Every other tensor, by its name in the file."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json, without quantization_config."""
    unquantized: list[str] = field(default_factory=list)
    """Module names of linears in bfloat16: what a format's ignore list names."""


def random_content(
    seed: int = 0,
    layers: Mapping[str, tuple[int, ...]] = LAYERS,
    scale_bytes: range = range(255),
    nan_codes: bool = False,
) -> Content:
    """Layers of the given shapes: every element code but the two NaN ones (if not asked for) in each, scale
    bytes spread over ``scale_bytes``, a bias in the first; and a norm, an embedding and an lm_head in bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes if nan_codes else codes[codes & 0x7F != 0x7F]
    bytes_ = torch.tensor(scale_bytes, dtype=torch.uint8)
    made = {}
    for name, (*rows, k) in layers.items():
        weight = _draw(codes, (*rows, k), generator).view(torch.float8_e4m3fn)
        made[name] = Layer(weight, _draw(bytes_, (*rows, k // 32), generator))
    first = next(iter(made.values()))
    first.bias = torch.randn(first.weight.shape[:-1], generator=generator).bfloat16()
    shapes = {"model.embed_tokens.weight": (48, 128), "model.norm.weight": (128,), "lm_head.weight": (48, 128)}
    plain = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return Content(made, plain, {"model_type": "llama"}, ["lm_head"])


def llama_content(model: nn.Module) -> Content:
    """The content of a ``transformers`` causal LM: its linears but lm_head quantized by the reference."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight, scale = reference.quantize(state.pop(f"{name}.weight"))
            layers[name] = Layer(weight, scale, state.pop(f"{name}.bias", None))
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    return Content(layers, state, config, ["lm_head"])


def block_constant(content: Content, rows: int) -> Content:
    """Every block of ``rows`` rows takes the scales of its first: what formats of ``[rows, 32]`` blocks can say."""

    def repeat(layer: Layer) -> Layer:
        scale = layer.scale[..., ::rows, :].repeat_interleave(rows, -2)
        return replace(layer, scale=scale[..., : layer.weight.shape[-2], :].contiguous())

    return _map(content, repeat)


def ragged(content: Content, cut: int = 20) -> Content:
    """``cut`` elements less along K, so the last block is short; the scales stay ``[N, ceil(K/32)]``.
    A reader is to give back ``padded(ragged(content))``.
    """
    return _map(content, lambda layer: replace(layer, weight=layer.weight[..., :-cut].contiguous()))


def padded(content: Content, rows: int = 1) -> Content:
    """Elements of +0 up to whole blocks along K and to a multiple of ``rows`` along N; new rows have scale byte 0."""

    def pad(layer: Layer) -> Layer:
        n, k = layer.weight.shape[-2:]
        codes = F.pad(layer.weight.view(torch.uint8), (0, -k % 32, 0, -n % rows))
        return replace(layer, weight=codes.view(torch.float8_e4m3fn), scale=F.pad(layer.scale, (0, 0, 0, -n % rows)))

    return _map(content, pad)


def per_expert(content: Content) -> Content:
    """Layers of ``[E, N, K]`` as one linear an expert: ``experts.gate_up_proj`` becomes ``experts.3.gate_proj``
    (the first half of its rows) and ``experts.3.up_proj``, other names only get the number.
    """
    layers = {}
    for name, layer in content.layers.items():
        if layer.weight.dim() == 2:
            layers[name] = layer
            continue
        parent, leaf = name.rsplit(".", 1)
        parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
        for expert, pair in enumerate(zip(layer.weight.unbind(), layer.scale.unbind(), strict=True)):
            split = [tensor.chunk(len(parts)) for tensor in pair]
            layers |= {f"{parent}.{expert}.{part}": Layer(*halves) for part, *halves in zip(parts, *split, strict=True)}
    return replace(content, layers=layers)


def with_kv_scales(content: Content) -> Content:
    """With the scales of an FP8 KV cache, one float32 for each k_proj and v_proj: no business of the weights."""
    kinds = {name: name[-len("k_proj")] for name in content.layers if name.endswith(("k_proj", "v_proj"))}
    scales = {f"{name}.{kind}_scale": torch.tensor(0.25) for name, kind in kinds.items()}
    return replace(content, plain=content.plain | scales)


def with_fp8_layer(content: Content, name: str = "model.layers.0.mlp.up_proj") -> Content:
    """With one linear in per-tensor FP8, which is not MXFP8 though its weight is float8_e4m3fn too: a float32
    scale for the tensor, another for its input.
    """
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    fp8 = {"weight": weight, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)}
    return replace(content, plain=content.plain | {f"{name}.{key}": tensor for key, tensor in fp8.items()})


def _map(content: Content, change: Callable[[Layer], Layer]) -> Content:
    return replace(content, layers={name: change(layer) for name, layer in content.layers.items()})


def _draw(values: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """``values`` in a random order, as often as they fit."""
    count = math.prod(shape)
    pool = values[torch.randperm(len(values), generator=generator)].repeat(-(-count // len(values)))[:count]
    return pool[torch.randperm(count, generator=generator)].reshape(shape)
