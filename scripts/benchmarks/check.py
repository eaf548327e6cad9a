"""Host time of the check for stale weights, on the CPU: a folded model against the same of plain linears."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

import mxfp8_ops
from lowering import backend

from . import compiled
from .model_options import CHECKED, ModelOptions
from .options import Record

K, N = 32, 16
CALLS = 50


class Independent(nn.Module):
    """Tiny linears, each on an x of its own: ``xs [layers, 1, K]``."""

    def __init__(self) -> None:
        super().__init__()
        linears = [nn.Linear(K, N, bias=False, dtype=torch.bfloat16) for _ in range(CHECKED)]
        self.linears = nn.ModuleList(linears)

    def forward(self, xs: Tensor) -> list[Tensor]:
        return [linear(x) for linear, x in zip(self.linears, xs.unbind(), strict=True)]


def records(options: ModelOptions) -> Iterator[tuple[str, Record]]:
    """One record: microseconds of a call of either model, what the difference is for a linear, and how much of that is
    the check. The rest is Dynamo's, which guards and hands over a weight and a scale instead of a weight.
    """
    torch.set_num_threads(1)
    dense, quantized = Independent(), Independent()
    mxfp8_ops.quantize_(quantized)
    xs = torch.randn(CHECKED, 1, K, dtype=torch.bfloat16)
    functions = {
        "linears": compiled.compile_as("bf16", dense, False),
        "folded": compiled.compile_as("folded", quantized, False),
    }
    calls = {name: partial(function, xs) for name, function in functions.items()}
    times = compiled.host_times(calls, 2 * options.rounds, CALLS)
    alone = compiled.host_times(graphs_that_do_nothing(quantized, xs), 2 * options.rounds, CALLS)
    us = {"us": compiled.medians(times, 1), "difference": difference(times), "check": difference(alone)}
    yield "check", {"linears": CHECKED} | us


def graphs_that_do_nothing(model: nn.Module, xs: Tensor) -> dict[str, compiled.Call]:
    """A folded graph in which nothing is computed, with what the lowering does in a call, and without."""
    found: list[tuple[Callable[..., Any], Sequence[Any]]] = []

    def lower(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        folding = backend.Options(dequant_at_load=True)
        found.append((backend.lower(gm, inputs, folding, {}, lambda gm, inputs, patches: nothing), inputs))
        return gm.forward

    torch.compile(model, backend=lower, fullgraph=True)(xs)
    ((lowered, inputs),) = found
    return {"linears": partial(nothing, *inputs), "folded": partial(lowered, *inputs)}


def nothing(*args: Any) -> None:
    """In place of a compiled graph."""


def difference(times: Mapping[str, list[float]]) -> float:
    """Microseconds a linear, the median over rounds, in each of which both were measured."""
    pairs = zip(times["folded"], times["linears"], strict=True)
    return round(statistics.median(folded - plain for folded, plain in pairs) / CHECKED, 3)
