"""Linears of one shape in a row, compiled, beside the eager kernel in a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mxfp8_ops

from . import compiled
from .devices import cuda_timer
from .model_options import CHAINED, MODES, ModelOptions
from .options import Record
from .timing import summary

SIZE = 4096


class Chain(nn.Module):
    """Square linears with a relu after each, on ``x [M, SIZE]``."""

    def __init__(self, layers: int, size: int, device: str) -> None:
        super().__init__()
        linears = [nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=device) for _ in range(layers)]
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = torch.relu(linear(x))
        return x


def records(options: ModelOptions) -> Iterator[tuple[str, Record]]:
    """One record for each mode and number of rows: microseconds a layer, a relu included unless it says "alone"."""
    dense = Chain(CHAINED, SIZE, options.device)
    quantized = copy.deepcopy(dense)
    mxfp8_ops.quantize_(quantized)
    eager = copy.deepcopy(quantized)
    mxfp8_ops.pack_(eager)
    for m in options.rows:
        x = torch.randn(m, SIZE, dtype=torch.bfloat16, device=options.device)
        torch._dynamo.mark_static_address(x)  # as it is for a CUDA graph of eager calls: else each replay copies it
        kernel = eager_times(eager, quantized, x, options.rounds)
        for mode in MODES:
            torch.compiler.reset()
            counters.clear()
            calls = {
                "bf16": _call("bf16", dense, mode, x),
                "folded": _call("folded", quantized, mode, x),
                "kept": _call("kept", quantized, mode, x),
                "eager packed": partial(eager, x) if mode == "default" else _replay(eager, x),
            }
            us = compiled.medians(compiled.device_times(calls, options.rounds), CHAINED)
            skips = compiled.cudagraph_skips()
            yield "blocks", {"mode": mode, "m": m, "us": us | kernel, "cudagraph_skips": skips}


def _call(variant: str, model: nn.Module, mode: str, x: Tensor) -> compiled.Call:
    return compiled.step_of(compiled.compile_as(variant, model, mode == "reduce-overhead"), x)


def eager_times(packed: Any, canonical: Any, x: Tensor, rounds: int) -> dict[str, float]:
    """Of kernels that are called eagerly, as CUDA graphs replay them."""
    columns: dict[str, list[compiled.Call]] = {
        "eager packed, alone": [partial(layer, x) for layer in packed.linears],
        "eager canonical, alone": [partial(layer, x) for layer in canonical.linears],
    }
    times = cuda_timer().interleaved(columns, rounds)
    return {name: round(summary(each)["us"], 3) for name, each in times.items()}


def _replay(model: Any, x: Tensor) -> compiled.Call:
    """A CUDA graph of all layers called eagerly, which costs as much to start as that of compiled code."""
    for _ in range(3):
        model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph.replay
