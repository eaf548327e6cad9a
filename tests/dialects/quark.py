"""Format 8, after the configs in AMD's Quark checkpoints and vLLM's ``quark_w8a8_mxfp8.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .content import Content
from .files import block_scale, layer_tensors, row_scale, write_config, write_tensors


def write_quark(folder: Path, content: Content, shards: int = 1) -> Path:
    """Weights ``per_group`` of 32 with uint8 scales ``[N, K/32]``."""
    write_config(folder, content, _config(content, _spec(is_dynamic=False)))
    write_tensors(folder, layer_tensors(content, "weight_scale", None, row_scale) | content.plain, shards)
    return folder


def write_quark_per_block(folder: Path, content: Content, shards: int = 1, rows: int = 32) -> Path:
    """Weights ``per_block`` of ``[rows, 32]`` with E8M0 scales ``[ceil(N/rows), K/32]``. In this spelling the
    scale's kind is in ``scale_type``, and ``scale_format`` is null.
    """
    weight = _spec(
        is_dynamic=False,
        qscheme="per_block",
        ch_axis=None,
        group_size=None,
        block_size=[rows, 32],
        symmetric=True,
        scale_type="float8_e8m0fnu",
        scale_format=None,
        scale_calculation_mode=None,
        observer_cls="PerBlock2DMinMaxObserver",
    )
    write_config(folder, content, _config(content, weight))
    tensors = layer_tensors(
        content, "weight_scale", None, lambda layer: block_scale(layer, rows).view(torch.float8_e8m0fnu)
    )
    write_tensors(folder, tensors | content.plain, shards)
    return folder


def _spec(**options: Any) -> dict[str, Any]:
    """How one tensor is quantized: MXFP8 but for ``options``."""
    return {
        "dtype": "fp8_e4m3",
        "is_dynamic": True,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": 32,
        "block_size": None,
        "symmetric": None,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": "e8m0",
        "scale_calculation_mode": "even",
        "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver",
        "is_scale_quant": False,
    } | options


def _config(content: Content, weight: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "input_tensors": _spec(),
            "output_tensors": None,
            "weight": weight,
            "bias": None,
            "target_device": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": content.unquantized,
        "algo_config": None,
        "softmax_quant_spec": None,
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "version": "0.13",
    }
