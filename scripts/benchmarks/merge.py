"""Linears on the same x in one kernel: the linears of Llama blocks, compiled with and without ``merge_linears``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mxfp8_ops

from . import compiled
from .model_options import ModelOptions
from .options import Record

BLOCKS = 4
"""So that a call takes the device longer than the host, and the weights are larger than any cache."""
HIDDEN, KEY, INTERMEDIATE = 4096, 1024, 14336


class Block(nn.Module):
    """The linears of a block of Llama-3-8B on ``x [M, hidden]``, with a product in place of the attention itself."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, hidden: int = HIDDEN, key: int = KEY, intermediate: int = INTERMEDIATE, device: str = "cuda"):
        super().__init__()
        sizes = {"q": (hidden, hidden), "k": (hidden, key), "v": (hidden, key), "o": (hidden, hidden)}
        sizes |= {"gate": (hidden, intermediate), "up": (hidden, intermediate), "down": (intermediate, hidden)}
        for name, (k, n) in sizes.items():
            setattr(self, name, nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device))
        self.groups = hidden // key

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        attended = self.q(h) * (self.k(h).sigmoid() + self.v(h)).repeat(1, self.groups)
        x = x + self.o(attended)
        h = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def records(options: ModelOptions) -> Iterator[tuple[str, Record]]:
    """One record for each number of rows, under reduce-overhead: microseconds a block, and how results differ."""
    dense = nn.Sequential(*(Block(device=options.device) for _ in range(BLOCKS)))
    quantized = copy.deepcopy(dense)
    mxfp8_ops.quantize_(quantized)
    for m in options.merge_rows:
        x = torch.randn(m, HIDDEN, dtype=torch.bfloat16, device=options.device)
        torch.compiler.reset()
        counters.clear()
        calls = {
            "bf16": compiled.step_of(compiled.compile_as("bf16", dense, True), x),
            "apart": compiled.step_of(compiled.compile_as("kept", quantized, True, merge_linears=False), x),
            "merged": compiled.step_of(compiled.compile_as("kept", quantized, True, merge_linears=True), x),
        }
        us = compiled.medians(compiled.device_times(calls, options.rounds), BLOCKS)
        error, skips = _difference(calls["apart"], calls["merged"]), compiled.cudagraph_skips()
        one = (compiled.compile_as("kept", quantized[0], False, merge_linears=merge) for merge in (False, True))
        of_one = _difference(*(partial(block, x) for block in one))
        yield "merge", {"m": m, "us": us, "error": error, "error of one block": of_one, "cudagraph_skips": skips}


def _difference(apart: compiled.Call, merged: compiled.Call) -> float:
    """Between the results of two calls: the norm of the difference over the norm."""
    one, other = (_result(call) for call in (apart, merged))
    return float(((other - one).norm() / one.norm()).item())


def _result(call: compiled.Call) -> Tensor:
    result = call()
    assert isinstance(result, Tensor)
    return result.double()  # a copy: the next call may write over it
