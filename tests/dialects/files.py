"""Names of tensors, files of tensors, files of JSON: what the formats have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .content import Content, Layer


def layer_tensors(
    content: Content, suffix: str, stacked: str | None, scale: Callable[[Layer], Tensor]
) -> dict[str, Tensor]:
    """Every tensor of the layers, by name in the file.

    A linear is ``M.weight``, ``M.<suffix>``, ``M.bias``. Experts in one tensor ``P = X.experts.gate_up_proj``
    are ``P``, ``P_<stacked>``, ``P_bias``; a format that does not know them has ``stacked=None``.
    """
    tensors = {}
    for name, layer in content.layers.items():
        if layer.weight.dim() == 2:
            weight_name, scale_name, bias_name = f"{name}.weight", f"{name}.{suffix}", f"{name}.bias"
        elif stacked is not None:
            weight_name, scale_name, bias_name = name, f"{name}_{stacked}", f"{name}_bias"
        else:
            raise ValueError(f"{name} is {list(layer.weight.shape)}, and this format knows one linear an expert")
        tensors |= {weight_name: layer.weight, scale_name: scale(layer)}
        if layer.bias is not None:
            tensors[bias_name] = layer.bias
    return tensors


def row_scale(layer: Layer) -> Tensor:
    """The scale bytes of a layer whose format has one for every row; raises if K is not whole blocks."""
    if layer.weight.shape[-1] % 32:
        raise ValueError(f"K = {layer.weight.shape[-1]} is no multiple of 32, and this format has no short blocks")
    return layer.scale


def block_scale(layer: Layer, rows: int) -> Tensor:
    """uint8 ``[..., ceil(N/rows), K/32]``, one scale for ``rows`` rows; raises if they differ within a block."""
    blocks = row_scale(layer)[..., ::rows, :].contiguous()
    if not torch.equal(blocks.repeat_interleave(rows, -2)[..., : layer.scale.shape[-2], :], layer.scale):
        raise ValueError(f"the scales differ within {rows} rows: see block_constant")
    return blocks


def write_json(path: Path, value: object) -> None:
    """Makes the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_config(folder: Path, content: Content, quantization: dict[str, Any] | None) -> None:
    """config.json, with ``quantization_config`` unless it is None."""
    extra = {} if quantization is None else {"quantization_config": quantization}
    write_json(folder / "config.json", content.config | extra)


def write_tensors(
    folder: Path,
    tensors: dict[str, Tensor],
    shards: int = 1,
    stem: str = "model",
    numbered: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """``stem.safetensors``, or above one shard (or ``numbered``) the layout of the Hugging Face hub: numbered files
    and an index.

    Tensors are dealt out one by one, so what stands together (a weight, then its scale) is in different files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = (metadata or {}) | {"format": "pt"}
    # save_file wants no shared memory
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1 and not numbered:
        save_file(tensors, folder / f"{stem}.safetensors", metadata)
        return
    names = [f"{stem}-{shard:05}-of-{shards:05}.safetensors" for shard in range(1, shards + 1)]
    weight_map = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file, metadata)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)
