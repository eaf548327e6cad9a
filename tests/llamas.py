"""Small models in folders, in bfloat16, in any MXFP8 format, and with the weights that this stands for."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from dialects import BLOCK_ROWS, WRITERS, Content, Layer, block_constant, llama_content
from helpers import assert_same
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mxfp8_ops import Mxfp8Linear, reference

PROMPT = (torch.arange(2 * 9) * 7 % 384).reshape(2, 9)
LAYER = "model.layers.1.mlp.down_proj"


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Two layers in bfloat16, with biases in the attention, and 48 rows in k_proj: no multiple of 32."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 384, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "head_dim": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = LlamaConfig(**{**sizes, **heads, "dtype": "bfloat16", **options})
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def content_of(variant: str, model: nn.Module | None = None) -> Content:
    """``model``, else ``llama()``, as a writer of ``variant`` can write it."""
    content = copy.deepcopy(_content()) if model is None else llama_content(model)
    return block_constant(content, BLOCK_ROWS[variant]) if variant in BLOCK_ROWS else content


@cache
def _content() -> Content:
    return llama_content(llama())


def empty(model: PreTrainedModel) -> PreTrainedModel:
    """A model like ``model`` whose parameters are on the meta device."""
    import accelerate

    with accelerate.init_empty_weights(include_buffers=False):
        new = type(model)(model.config).eval()
    new.tie_weights()
    return new.requires_grad_(False)


def dense(model: PreTrainedModel, content: Content) -> PreTrainedModel:
    """A model like ``model`` with the values of ``content``, dequantized by the reference. Not a copy: ``bfloat16()``
    also rounds buffers that no checkpoint has.
    """
    new = empty(model)
    new.load_state_dict(dense_state(content), assign=True)
    return new


def generate(logits: object, prompt: Tensor, count: int) -> list[int]:
    """``count`` tokens after ``prompt [1, T]``, the most probable one each time. ``logits [1, T + count, vocabulary]``
    is always called with as many tokens, so that a compiled one compiles once.
    """
    length = prompt.shape[1]
    ids = torch.nn.functional.pad(prompt, (0, count))
    for position in range(length, length + count):
        ids[0, position] = logits(ids)[0, position - 1].argmax()  # type: ignore[operator]
    return ids[0, length:].tolist()


def write(folder: Path, variant: str, content: Content, shards: int = 1) -> Path:
    return WRITERS[variant](folder, content, shards=shards)


def dense_state(content: Content, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The tensors of ``content``, those of layers dequantized by the reference."""
    tensors = dict(content.plain)
    for name, layer in content.layers.items():
        tensors[name + ".weight" * (layer.weight.dim() == 2)] = reference.dequant(layer.weight, layer.scale, dtype)
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    return tensors


def write_dense(folder: Path, content: Content, dtype: torch.dtype = torch.bfloat16) -> Path:
    """What ``content`` stands for, without any quantization."""
    tensors = dense_state(content, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content.config))
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def kinds(model: nn.Module) -> dict[str, str]:
    """The class of every linear, by name."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Mxfp8Linear)
    }


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """Equal names, dtypes and bytes of all that the two models would save."""
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert_same(tensor, states[1][name])


def assert_holds(model: nn.Module, content: Content) -> None:
    """Every layer of ``content`` is in ``model`` bit for bit."""
    for name, layer in content.layers.items():
        module = model.get_submodule(name)
        assert type(module) is Mxfp8Linear, name
        assert_same(module.weight, layer.weight)
        assert_same(module.weight_scale, layer.scale)
        assert not module.weight.requires_grad
        if layer.bias is not None:
            assert_same(module.bias, layer.bias)


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replaces tensors of ``LAYER``, or removes them where the change is None."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[f"{LAYER}.{name}"]
        else:
            tensors[f"{LAYER}.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors")


def quantization_of(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def without(content: Content, name: str) -> Content:
    """``content`` with one layer in bfloat16, and named as such."""
    layers = dict(content.layers)
    layer: Layer = layers.pop(name)
    plain = content.plain | {f"{name}.weight": reference.dequant(layer.weight, layer.scale)}
    return replace(content, layers=layers, plain=plain, unquantized=[*content.unquantized, name])
