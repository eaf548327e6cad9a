"""Peak memory of the first call of a compiled model, in which weights are dequantized or packed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import lowering
import mxfp8_ops

from .model_options import ModelOptions
from .options import Record

LAYERS, SIZE = 64, 4096
"""2 GiB in bfloat16."""
ROWS = 16


def records(options: ModelOptions, way: str) -> Iterator[tuple[str, Record]]:
    """One record: bytes above what was there before the model, as CUDA's allocator counts them."""
    x = torch.randn(ROWS, SIZE, dtype=torch.bfloat16, device=options.device)
    x @ torch.zeros(SIZE, SIZE, dtype=torch.bfloat16, device=options.device)  # makes what cuBLAS keeps
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = nn.Sequential(*(_layer(options.device) for _ in range(LAYERS)))
    quantized = torch.cuda.memory_allocated() - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch._inductor.config.patch(freezing=way == "frozen"):
        function = torch.compile(model, fullgraph=True, dynamic=False, **_arguments(way))
        function(x)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        gc.collect()
        after = torch.cuda.memory_allocated() - before
    dense = LAYERS * SIZE * SIZE * 2
    sizes = {"quantized": quantized, "bf16": dense, "peak": peak, "after": after, "layer": dense // LAYERS}
    yield "peak", {"way": way} | sizes


def _layer(device: str) -> mxfp8_ops.Mxfp8Linear:
    weight = torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device=device).mul_(SIZE**-0.5)
    return mxfp8_ops.Mxfp8Linear.from_float(weight)


def _arguments(way: str) -> dict[str, Any]:
    if way == "frozen":
        return {"options": lowering.options(dequant_at_load=True)}
    return {"backend": "mxfp8", "options": {"dequant_at_load": way == "folded", "release_quantized": True}}
