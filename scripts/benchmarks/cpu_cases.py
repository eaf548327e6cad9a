"""Small problems that between them run every path of the CPU kernels, for sanitizers: every tensor is an allocation of
its own, whose bounds they know, and every result is compared with the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import reference
from mxfp8_ops.format import QUANTIZE_RULES

from .case import DTYPES, Case

SHAPES = ((1, 32), (7, 96), (33, 288), (67, 4128))
SMALL_SHAPES = SHAPES[1:3]
ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 70)
SMALL_ROWS = (1, 5, 16, 33)
THREADS = (1, 3)


def cases(small: bool) -> Iterator[Case]:
    """All of them, or so few that they take seconds; always in the same order."""
    for n, k in SMALL_SHAPES if small else SHAPES:
        for dtype in DTYPES:
            for rule in QUANTIZE_RULES:
                yield Case(f"quantize {n}x{k} from {dtype}, {rule}", partial(_quantize, n, k, dtype, rule))
            yield Case(f"dequant {n}x{k} to {dtype}", partial(_dequant, n, k, dtype))
            for m in SMALL_ROWS if small else ROWS:
                yield Case(f"linear M={m}, {n}x{k}, {dtype}", partial(_linear, m, n, k, dtype))


def _quantize(n: int, k: int, dtype: torch.dtype, rule: str) -> None:
    x = torch.randn(n, k).to(dtype)
    x[-1, :32], x[0, 0] = 0, torch.inf
    for tensor in (x, _unaligned(x)):
        for actual, expected in zip(mxfp8_ops.quantize(tensor, rule), reference.quantize(x, rule), strict=True):
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def _dequant(n: int, k: int, dtype: torch.dtype) -> None:
    weight, scale = _weight(n, k)
    expected = reference.dequant(weight, scale, dtype)
    for pair in ((weight, scale), (_unaligned(weight), _unaligned(scale))):
        torch.testing.assert_close(mxfp8_ops.dequant(*pair, dtype), expected, rtol=0, atol=0, equal_nan=True)


def _linear(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """With a bias and without, on tensors at odd addresses and with gaps between rows, by one thread and by several."""
    weight, scale = _weight(n, k)
    x, bias = (torch.randn(m, k) / 4).to(dtype), torch.randn(n).to(dtype)
    forms = (
        (x, weight, scale, bias),
        (_unaligned(x), _unaligned(weight), _unaligned(scale), None),
        (torch.cat([x, x], -1)[:, :k], weight, scale, None),
    )
    for threads in THREADS:
        torch.set_num_threads(threads)
        for form in forms:
            added = None if form[-1] is None else bias.float()
            expected = reference.linear(x.float(), weight, scale, added)
            actual = mxfp8_ops.linear(*form).float()
            torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.05, equal_nan=True)


def _weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    """``weight [n, k]`` and ``scale [n, k/32]``, with what kernels treat apart in the last row."""
    weight = torch.randn(n, k).clamp_(-2, 2).to(torch.float8_e4m3fn)
    scale = torch.randint(122, 128, (n, k // 32), dtype=torch.uint8)
    scale[-1, 0] = 0
    weight[-1, -1] = torch.nan
    return weight, scale


def _unaligned(tensor: Tensor) -> Tensor:
    """A copy that begins one element behind an aligned address, and ends where its memory ends."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    copy = memory[1:].view(tensor.shape)
    copy.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
    return copy
