"""Checkpoints of every MXFP8 format, written as the format's own tool writes them, from one content.

``WRITERS[name](folder, content, shards=1)`` makes the folder and returns it. Nothing here shares code with
the package's reader of checkpoints: the two check each other. What a reader must give back is the content
itself, but where a writer's docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .comfyui import write_comfyui
from .compressed import write_auto_round, write_compressed_tensors
from .content import (
    EXPERTS,
    LAYERS,
    Content,
    Layer,
    block_constant,
    llama_content,
    padded,
    per_expert,
    ragged,
    random_content,
    with_fp8_layer,
    with_kv_scales,
)
from .fp8 import fp8_config, minimax_config, transformers_mxfp8_config, write_fp8
from .modelopt import write_modelopt, write_modelopt_hf_quant_config, write_modelopt_mixed
from .modelslim import write_modelslim
from .quark import write_quark, write_quark_per_block
from .swizzle import swizzled
from .torchao import write_torchao

__all__ = [
    "BLOCK_ROWS",
    "EXPERTS",
    "LAYERS",
    "STACKED_EXPERTS",
    "WRITERS",
    "Content",
    "Layer",
    "block_constant",
    "llama_content",
    "padded",
    "per_expert",
    "ragged",
    "random_content",
    "sayable",
    "swizzled",
    "with_fp8_layer",
    "with_kv_scales",
]

E8M0 = torch.float8_e8m0fnu


def sayable(name: str, content: Content) -> Content:
    """``content`` as far as the dialect ``name`` can say it: what a reader is to give back of it."""
    if name in BLOCK_ROWS:
        content = block_constant(content, BLOCK_ROWS[name])
    if name.startswith("comfyui"):
        content = padded(content, rows=32)
    if name == "modelslim":
        layers = padded(content).layers
        layers = {
            key: replace(each, bias=None if each.bias is None else each.bias.float()) for key, each in layers.items()
        }
        content = replace(content, layers=layers)
    return content


WRITERS: dict[str, Callable[..., Path]] = {
    "modelopt": write_modelopt,
    "modelopt-hf-quant-config": write_modelopt_hf_quant_config,
    "modelopt-mixed": write_modelopt_mixed,
    "mxfp8": partial(write_fp8, config=minimax_config),
    "mxfp8-transformers": partial(write_fp8, config=transformers_mxfp8_config, dtype=E8M0),
    "fp8-1x32": partial(write_fp8, config=fp8_config),
    "fp8-1x32-e8m0": partial(write_fp8, config=fp8_config, dtype=E8M0),
    "fp8-32x32": partial(write_fp8, config=fp8_config, rows=32, dtype=E8M0),
    "fp8-32x32-u8": partial(write_fp8, config=fp8_config, rows=32),
    "fp8-32x32-scale": partial(write_fp8, config=fp8_config, rows=32, dtype=E8M0, suffix="scale"),
    "compressed-tensors": write_compressed_tensors,
    "auto-round": write_auto_round,
    "quark": write_quark,
    "quark-per-block": write_quark_per_block,
    "modelslim": write_modelslim,
    "comfyui": write_comfyui,
    "comfyui-metadata": partial(write_comfyui, markers=False, dtype=torch.uint8),
    "torchao": partial(write_torchao, swizzle=False),
    "torchao-swizzled": partial(write_torchao, swizzle=True),
    "torchao-swizzle-type": partial(write_torchao, swizzle=True, attribute="swizzle_type"),
}
"""A writer of each variant. All take ``shards``; above 1 a weight and its scale are in different files."""

BLOCK_ROWS = {"fp8-32x32": 32, "fp8-32x32-u8": 32, "fp8-32x32-scale": 32, "quark-per-block": 32}
"""Rows that share a scale on disk: these writers take what ``block_constant(content, rows)`` gives."""

STACKED_EXPERTS = frozenset(
    {"modelopt", "modelopt-hf-quant-config", "modelopt-mixed", "mxfp8", "mxfp8-transformers", "fp8-1x32"}
    | {"fp8-1x32-e8m0", "fp8-32x32", "fp8-32x32-u8", "torchao", "torchao-swizzled", "torchao-swizzle-type"}
)
"""Writers that take layers of ``[E, N, K]``; the others know one linear an expert, see ``per_expert``."""
