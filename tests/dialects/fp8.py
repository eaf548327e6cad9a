"""Formats 3, 4 and 5: ``weight_scale_inv``, which in spite of its name multiplies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .content import Content
from .files import block_scale, layer_tensors, write_config, write_tensors

Config = Callable[[Content, int], dict[str, Any]]


def minimax_config(content: Content, rows: int) -> dict[str, Any]:
    """As in MiniMax-M3's config.json: the method has its own name, the list too."""
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, 32],
        "scale_fmt": "ue8m0",
        "ignored_layers": content.unquantized,
    }


def fp8_config(content: Content, rows: int) -> dict[str, Any]:
    """As transformers saves it, of ``quant_method`` fp8."""
    return _transformers_config(content, rows)


def transformers_mxfp8_config(content: Content, rows: int) -> dict[str, Any]:
    """As transformers saves a model it loaded under ``quant_method`` mxfp8."""
    return _transformers_config(content, rows, quant_method="mxfp8")


def write_fp8(
    folder: Path,
    content: Content,
    *,
    config: Config,
    rows: int = 1,
    dtype: torch.dtype = torch.uint8,
    suffix: str = "weight_scale_inv",
    shards: int = 1,
) -> Path:
    """Scales ``[ceil(N/rows), K/32]`` of ``dtype``; the layout of transformers' fine-grained FP8.

    Experts in one tensor: ``X.experts.gate_up_proj`` and ``..._scale_inv``. DeepSeek-V4.1 says ``M.scale``
    instead of ``M.weight_scale_inv`` (``suffix``), and has one linear an expert.
    """
    stacked = "scale_inv" if suffix == "weight_scale_inv" else None
    tensors = layer_tensors(content, suffix, stacked, lambda layer: block_scale(layer, rows).view(dtype))
    write_config(folder, content, config(content, rows))
    write_tensors(folder, tensors | content.plain, shards)
    return folder


def _transformers_config(content: Content, rows: int, **options: Any) -> dict[str, Any]:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(
        weight_block_size=(rows, 32), scale_fmt="ue8m0", modules_to_not_convert=content.unquantized, **options
    ).to_dict()
