"""Format 10, after ComfyUI's QUANTIZATION.md and ``comfy/ops.py``, and comfy-kitchen's MXFP8 layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .content import Content, Layer, padded
from .files import layer_tensors, row_scale, write_tensors
from .swizzle import swizzled

FORMAT = {"format": "mxfp8"}


def write_comfyui(
    folder: Path,
    content: Content,
    *,
    markers: bool = True,
    dtype: torch.dtype = torch.float8_e8m0fnu,
    shards: int = 1,
) -> Path:
    """One file and no config. Weights are padded to multiples of 32 rows, so a reader is to give back
    ``padded(content, rows=32)``; scales are swizzled, in the shape of the padded matrix, which does not show it:
    ``[128 * ceil(N/128), 4 * ceil(K/128)]``. What says so is the file's metadata, and a tensor of JSON for each
    layer (``markers``). ``dtype`` of the scales is uint8 in older files.
    """
    if shards != 1:
        raise ValueError(f"ComfyUI has one file, not {shards}")
    content = padded(content, rows=32)
    tensors = layer_tensors(content, "weight_scale", None, lambda layer: _scale(layer).view(dtype))
    if markers:
        marker = torch.tensor(list(json.dumps(FORMAT).encode()), dtype=torch.uint8)
        tensors |= {f"{name}.comfy_quant": marker for name in content.layers}
    layers = {"format_version": "1.0", "layers": dict.fromkeys(content.layers, FORMAT)}
    metadata = {"_quantization_metadata": json.dumps(layers)}
    write_tensors(folder, tensors | content.plain, stem="model_mxfp8", metadata=metadata)
    return folder


def _scale(layer: Layer) -> Tensor:
    n, columns = row_scale(layer).shape
    return swizzled(layer.scale).view(-(-n // 128) * 128, -(-columns // 4) * 4)
