"""Models compiled in each variant, and the time of calls of what results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mxfp8_ops

from .sections import emulated_linear

Call: TypeAlias = Callable[[], object]

CALLS = 20
"""Made in a row in each round."""
WARM_UP = 4
"""Calls that compile, record CUDA graphs and replay them."""
OURS: dict[str, dict[str, Any]] = {"kept": {"dequant_at_load": False}, "folded": {"dequant_at_load": True}}
"""Options of the backend, for the variants that are compiled with it."""


class EmulatedLinear(nn.Module):
    """A linear as vLLM's emulation computes it: ``weight [N, K]`` is dequantized by torch's operators in every call."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, layer: mxfp8_ops.Mxfp8Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("weight_scale", layer.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        return emulated_linear(x, self.weight, self.weight_scale)


def emulate_(model: nn.Module) -> None:
    """Every ``Mxfp8Linear`` becomes an ``EmulatedLinear``, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, mxfp8_ops.Mxfp8Linear):
                setattr(module, name, EmulatedLinear(child))


def compile_as(variant: str, function: Callable[..., Any], cudagraphs: bool, **ours: Any) -> Callable[..., Any]:
    """``torch.compile`` for one variant, whole and for fixed shapes; ``ours`` are further options of the backend.

    Mode "reduce-overhead" is that option: torch takes a mode or options.
    """
    options: dict[str, Any] = {"triton.cudagraphs": True} if cudagraphs else {}
    if variant in OURS:
        options |= OURS[variant] | ours
    backend = "mxfp8" if variant in OURS else "inductor"
    return torch.compile(function, backend=backend, options=options, fullgraph=True, dynamic=False)


def step_of(function: Callable[..., Any], *args: Any) -> Call:
    """A call that begins a step of CUDA graphs, in which results of earlier ones may be overwritten."""

    def call() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*args)

    return call


def cudagraph_skips() -> int:
    """How many graphs Inductor would not make CUDA graphs of, since the last reset of its counters."""
    return int(counters["inductor"]["cudagraph_skips"])


def device_times(columns: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call between events of the device, in as many rounds: in each, one column after the other."""

    def time_of(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # brings the device's clocks and caches to this column, and is at work while the host begins the next
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000 / CALLS

    return _in_turns(columns, rounds, time_of)


def host_times(columns: Mapping[str, Call], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of a call by the host's clock, in as many rounds."""

    def time_of(call: Call) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) * 1e6 / calls

    return _in_turns(columns, rounds, time_of)


def _in_turns(columns: Mapping[str, Call], rounds: int, time_of: Callable[[Call], float]) -> dict[str, list[float]]:
    for call in columns.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in columns}
    for _ in range(rounds):
        for name, call in columns.items():
            times[name].append(time_of(call))
    return times


def medians(times: Mapping[str, list[float]], divisor: int) -> dict[str, float]:
    """Of each column, in microseconds of one of ``divisor`` parts of a call."""
    return {name: round(statistics.median(each) / divisor, 3) for name, each in times.items()}
