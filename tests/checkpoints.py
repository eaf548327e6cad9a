"""What the tests of reading checkpoints share: one of each format with what must come back, and ways to damage it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dialects import BLOCK_ROWS, WRITERS, Content, block_constant, padded, random_content
from helpers import assert_same
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp8_ops.checkpoint import Checkpoint, open_checkpoint

INDEX = "model.safetensors.index.json"
SMALL = {"model.layers.0.self_attn.q_proj": (96, 64), "model.layers.0.self_attn.k_proj": (32, 64)}
SCALES = {
    "modelopt": (".weight_scale", "_weight_scale"),
    "mxfp8": (".weight_scale_inv", "_scale_inv"),
    "fp8-1x32": (".weight_scale_inv", "_scale_inv"),
    "compressed-tensors": (".weight_scale", None),
}
"""What the scales of a module are called in the formats that are written, and those of experts in one tensor."""


def made(folder: Path, name: str, content: Content | None = None, shards: int = 1) -> tuple[Path, Content]:
    """A checkpoint in the format ``name``, and the content that a reader must give back."""
    if name == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    content = content or random_content()
    if rows := BLOCK_ROWS.get(name):
        content = block_constant(content, rows)
    path = WRITERS[name](folder, content, shards=shards)
    if "comfyui" in name:
        content = padded(content, rows=32)
    if name == "modelslim":
        layers = {
            key: replace(layer, bias=None if layer.bias is None else layer.bias.float())
            for key, layer in padded(content).layers.items()
        }
        content = replace(content, layers=layers)
    return path, content


def assert_gives_back(checkpoint: Checkpoint, content: Content) -> None:
    """Each layer and each other tensor, bit for bit, and no more of them. Formats have marker tensors of their own."""
    assert checkpoint.keys() == content.layers.keys()
    for name, layer in content.layers.items():
        weight, scale, bias = checkpoint[name]
        assert_same(weight, layer.weight)
        assert_same(scale, layer.scale)
        if layer.weight.dim() == 2:
            assert (bias is None) == (layer.bias is None)
        if layer.bias is not None:
            assert_same(checkpoint.files.read(f"{name}_bias") if bias is None else bias, layer.bias)
    others = {name for name in checkpoint.plain if not name.endswith(("_bias", ".comfy_quant"))}
    assert others == content.plain.keys()
    for name, tensor in content.plain.items():
        assert_same(checkpoint.files.read(name), tensor)


def assert_opens_as(path: Path, content: Content) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    assert_gives_back(checkpoint, content)
    return checkpoint


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint, whatever its shards, as any reader of safetensors finds it."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_holds(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """These tensors, bit for bit, and no others."""
    found = tensors_in(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(found[name], tensor)


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def save(folder: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of one file."""
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_by_name() -> dict[str, Tensor]:
    """No architecture that anybody knows; every dtype that can be quantized."""
    return {
        "layers.0.up.weight": torch.randn(96, 64).bfloat16(),
        "layers.0.up.bias": torch.randn(96).bfloat16(),
        "layers.0.down.weight": torch.randn(64, 96).half(),
        "layers.1.up.weight": torch.randn(7, 320) * torch.logspace(-20, 20, 7)[:, None],
        "layers.1.odd.weight": torch.randn(64, 40),
        "layers.1.gate.weight": torch.randn(8, 64),
        "layers.1.counts.weight": torch.ones(8, 64, dtype=torch.int64),
        "layers.1.wide.weight": torch.randn(8, 64).double(),
        "mlp.experts.gate_up_proj": torch.randn(2, 64, 64),
        "conv.weight": torch.randn(8, 3, 3, 32),
        "tok_embeddings.weight": torch.randn(16, 64),
        "norm.weight": torch.randn(64),
        "lm_head.weight": torch.randn(16, 64),
        "in_proj_weight": torch.randn(64, 64),
    }


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the object in a JSON file in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of ``quantization_config``; None for a key to be left out."""

    def edit(config: dict[str, Any]) -> None:
        said = config["quantization_config"] | changes
        config["quantization_config"] = {key: value for key, value in said.items() if value is not None}

    edit_json(folder / "config.json", edit)


def raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as JSON, and the bytes behind it."""
    file = path.read_bytes()
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of any header: bytes, text or something to make JSON of; ``length`` is what it claims."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    encoded = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header in place, and leaves the data alone."""
    header, data = raw(path)
    edit(header)
    write_raw(path, header, data)


def replace_tensors(path: Path, changes: Mapping[str, Tensor | None], **metadata: str | None) -> None:
    """Rewrites a safetensors file with some tensors or texts of its metadata changed, added, or (None) left out."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = file.metadata() | metadata
    tensors = {name: tensor.clone() for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    save_file(tensors, path, {key: text for key, text in texts.items() if text is not None})


def small(folder: Path, name: str = "mxfp8", shards: int = 1) -> tuple[Path, Content]:
    return made(folder, name, copy.deepcopy(_small_content()), shards)


@functools.cache
def _small_content() -> Content:
    return random_content(layers=SMALL)
