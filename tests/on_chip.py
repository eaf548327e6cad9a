"""Weights on a CUDA device, packed or canonical, and linear on either. Only where Triton and Gluon can be imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
import torch
from helpers import exact_linear_inputs, float64_values, round_once
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import packing
from mxfp8_ops.gpu import hopper

HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper chip"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16", "float32"])
SHORT = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["bfloat16", "float16"])
FORM = pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
EACH_FORM = pytest.mark.parametrize(
    "packed_for", [*packing.PACKED_FOR, None], ids=["for bfloat16", "for float16", "canonical"]
)
EACH_KERNEL = (1, 3, 8, 16, 64, 128, 256)
"""Rows of x that between them meet all kernels."""
OnChip: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""A weight on the device, packed or canonical."""


def on_device(*tensors: Tensor) -> Iterator[Tensor]:
    return (tensor.cuda() for tensor in tensors)


def packed_on_device(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """For x of ``dtype``; that of float32, for which a weight cannot be packed, makes do with any other."""
    return mxfp8_ops.pack(*on_device(weight, scale), dtype if dtype in packing.PACKED_FOR else torch.float16)


def put(weight: Tensor, scale: Tensor, packed: bool, dtype: torch.dtype) -> OnChip:
    return packed_on_device(weight, scale, dtype) if packed else (weight.cuda(), scale.cuda())


def linear(x: Tensor, on_chip: OnChip, n: int, bias: Tensor | None = None) -> Tensor:
    """The operator for a weight of either form."""
    if isinstance(on_chip, Tensor):
        return mxfp8_ops.linear_packed(x, on_chip, n, bias)
    return mxfp8_ops.linear(x, *on_chip, bias)


def in_sixteens(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """With rows of zeros after the others, so that their number is a multiple of 16."""
    more = -len(weight) % 16
    zeros = torch.zeros(more, weight.shape[1], dtype=torch.uint8)
    ones = torch.full((more, scale.shape[1]), 127, dtype=torch.uint8)
    return torch.cat([weight.view(torch.uint8), zeros]).view(weight.dtype), torch.cat([scale, ones])


def source_of(on_chip: OnChip) -> Tensor | hopper.Canonical:
    """As the kernels take it."""
    if isinstance(on_chip, Tensor):
        return on_chip
    return hopper.Canonical(*(each.view(torch.int32) for each in on_chip))


def problem(m: int, n: int, k: int, dtype: torch.dtype, packed: bool) -> tuple[Tensor, OnChip, Tensor, Tensor]:
    """``x`` before rows of NaN in memory, the weight, bias, and what is expected; on the device."""
    x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
    exact = x.double() @ float64_values(weight, scale).T + bias.double()
    longer = torch.cat([x, torch.full((256, k), torch.nan, dtype=dtype)]).cuda()
    return longer[:m], put(weight, scale, packed, dtype), bias.cuda(), round_once(exact, dtype).cuda()


def guarded(m: int, n: int, dtype: torch.dtype, run: Callable[[Tensor], object]) -> Tensor:
    """What ``run`` writes to ``[m, n]`` on the device, NaN before: checks that nothing is written next to it."""
    memory = torch.full((m * n + 4096,), torch.nan, dtype=dtype, device="cuda")
    memory[:2048], memory[-2048:] = 7, 7
    out = memory[2048:-2048].view(m, n)
    run(out)
    assert (memory[:2048] == 7).all()
    assert (memory[-2048:] == 7).all()
    return out


def processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count
