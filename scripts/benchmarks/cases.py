"""Small problems that between them launch every GPU kernel, for tools that watch what kernels do to memory.

Kernels compile for seconds, and anew for each dtype and for a bias. So bfloat16 comes with a bias and float16 without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias
from unittest import mock

import torch
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import reference
from mxfp8_ops.format import QUANTIZE_RULES
from mxfp8_ops.gpu import dispatch, elementwise, hopper, partial_sums, plans, plans_vectors, vectors
from mxfp8_ops.gpu.kinds_few import Direct, Narrow, Row, Vectors
from mxfp8_ops.packing import PACKED_FOR

from .case import DTYPES, Case, packed_for

PACKED_ROWS = (1, 2, 4, 8, 16, 33, 64, 100, 128, 256)
PACKED_SHAPES = ((136, 288), (300, 384))
CANONICAL_ROWS = (1, 2, 5, 16, 40)
CANONICAL_SHAPES = ((7, 288), (136, 256), (300, 384))
PLAN_ROWS = (1, 3, 5, 13, 29, 45, 61, 77, 93, 125, 157, 189, 253, 317)
"""Somewhat fewer than the kernels for Hopper have in a tile: each kernel gets as many as it can take of them."""


def cases() -> Iterator[Case]:
    """All of them, always in the same order."""
    for dtype in DTYPES:
        for rule in QUANTIZE_RULES:
            yield Case(f"quantize from {dtype}, {rule}", partial(_quantize, dtype, rule))
        yield Case(f"dequant to {dtype}", partial(_dequant, dtype))
    for problem in _problems():
        yield Case(str(problem), partial(_linear, problem, _operator))
    if dispatch.reads_packed(torch.device("cuda", torch.cuda.current_device())):
        for problem, plan in itertools.chain(_planned(), _vectors()):
            yield Case(f"{problem}, {plan}", partial(_linear, problem, _with(plan)))


# --- elementwise ---------------------------------------------------------------------------------------------


def _quantize(dtype: torch.dtype, rule: str) -> None:
    x = torch.randn(7, 288).to(dtype)
    x[1], x[2, 3], x[3, 4] = 0, torch.inf, torch.nan
    for actual, expected in zip(mxfp8_ops.quantize(x.cuda(), rule), reference.quantize(x, rule), strict=True):
        torch.testing.assert_close(actual.cpu().view(torch.uint8), expected.view(torch.uint8))


def _dequant(dtype: torch.dtype) -> None:
    weight, scale = _weight(136, 288, extreme=False)
    expected = reference.dequant(weight, scale, dtype)
    torch.testing.assert_close(mxfp8_ops.dequant(weight.cuda(), scale.cuda(), dtype).cpu(), expected)
    for each in PACKED_FOR:
        packed = mxfp8_ops.pack(weight, scale, each).cuda()
        torch.testing.assert_close(elementwise.dequant_packed(packed, 136, 288, dtype).cpu(), expected)


# --- linear --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A linear of ``x [m, k]`` with a weight ``[n, k]``."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    packed: bool

    @property
    def bias(self) -> bool:
        return self.dtype != torch.float16

    def __str__(self) -> str:
        form = "linear_packed" if self.packed else "linear"
        return f"{form}, M={self.m}, {self.n}x{self.k}, {self.dtype}"


def _problems() -> Iterator[Problem]:
    for dtype in DTYPES[:2]:
        for n, k in PACKED_SHAPES:
            yield from (Problem(m, n, k, dtype, True) for m in PACKED_ROWS)
        for n, k in CANONICAL_SHAPES:
            yield from (Problem(m, n, k, dtype, False) for m in CANONICAL_ROWS)
            if k % 128 == 0:  # else as many rows are left to F.linear
                yield Problem(100, n, k, dtype, False)
        yield Problem(40, 136, 2080, dtype, False)  # parts of K, by warps for any chip
    yield from (Problem(m, 136, 288, torch.float32, False) for m in (1, 2, 5))


def _planned() -> Iterator[tuple[Problem, plans.Plan]]:
    """Every kernel for Hopper, on whole tiles and on parts."""
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    tiled = plans.Skinny | plans.Wide
    for packed, k, kind in (
        (True, 1056, tiled),
        (True, 2176, Narrow),  # takes whole blocks of K alone; more turns than there are stages
        (True, 4096, Row),  # takes whole turns alone
        (True, 4128, Direct),  # for all of whose warps there is work
        (False, 1024, tiled),
    ):
        for m in PLAN_ROWS:
            found = [plan for plan in plans.candidates(m, 300, k, processors, packed) if isinstance(plan, kind)]
            whole = [each for each in found if m == max(rows for rows in PLAN_ROWS if rows <= each.rows)]
            for plan in (small for each in whole for small in _small(each)):
                yield from ((Problem(m, 300, k, dtype, packed), plan) for dtype in DTYPES[:2])


def _small(plan: plans.Plan) -> Iterator[plans.Plan]:
    """What runs the same code on three tiles: two parts instead of more; and for ``wide`` two programs, which have
    tiles after another then and share one, eight, of which several store parts of one tile, and nine, which have equal
    parts, so short that some have none.
    """
    if isinstance(plan, Direct | Narrow | Vectors):
        yield plan
    elif isinstance(plan, plans.Skinny):
        if plan.parts <= 2:
            yield plan
    elif not plan.shared:
        yield from (plans.Wide(2, 0, plan.rows), *(plans.Wide(programs, 3, plan.rows) for programs in (2, 8, 9)))


def _vectors() -> Iterator[tuple[Problem, Vectors]]:
    """Every kind of that kernel, on whole turns and on what is left: scales come in bytes, or in words."""
    for kind in plans_vectors.COSTS:
        for dtype, k in zip(DTYPES[:2], (4128, 4224), strict=True):
            yield Problem(kind.rows - 1, 300, k, dtype, False), kind


Weight: TypeAlias = tuple[Tensor, ...]
"""On the device: ``(packed,)`` or ``(weight, scale)``."""
Linear: TypeAlias = Callable[[Problem, Tensor, Weight, Tensor | None], Tensor]


def _linear(problem: Problem, linear: Linear) -> None:
    """With a weight that kernels decode fast, and with one that they do not."""
    for extreme in (False, True):
        x = (torch.randn(problem.m, problem.k) / 4).to(problem.dtype)
        bias = torch.randn(problem.n).to(problem.dtype) if problem.bias else None
        canonical = _weight(problem.n, problem.k, extreme)
        stored = (mxfp8_ops.pack(*canonical, packed_for(problem.dtype)),) if problem.packed else canonical
        on_device = None if bias is None else bias.cuda()
        actual = linear(problem, x.cuda(), tuple(each.cuda() for each in stored), on_device)
        expected = reference.linear(x.float(), *canonical, None if bias is None else bias.float())
        torch.testing.assert_close(actual.float().cpu(), expected, rtol=0.01, atol=0.05)  # NaN is never close


def _operator(problem: Problem, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if problem.packed:
        return mxfp8_ops.linear_packed(x, weight[0], problem.n, bias)
    return mxfp8_ops.linear(x, weight[0], weight[1], bias)


def _with(plan: plans.Plan) -> Linear:
    def linear(problem: Problem, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        out = torch.empty(problem.m, problem.n, dtype=x.dtype, device=x.device)
        if isinstance(plan, Vectors):  # also where scales are no words
            vectors.run(plan, x, weight[0], weight[1], bias, out)
            return out
        words = weight[0] if problem.packed else hopper.Canonical(*(each.view(torch.int32) for each in weight))
        with mock.patch.object(partial_sums, "memory", partial(_unsaid, partial_sums.memory)):
            hopper._run(plan, x, words, bias, out)
        return out

    return linear


def _unsaid(memory: Callable[..., Tensor], slots: int, size: int, device: torch.device) -> Tensor:
    """The memory through which programs share tiles, but cleared where they say that sums are stored: others look there
    before, for a random number, and whatever else they find is as good as nothing.
    """
    new = memory(slots, size, device)
    new[slots * size :] = 0
    return new


def _weight(n: int, k: int, extreme: bool) -> tuple[Tensor, Tensor]:
    """``weight [n, k]`` and ``scale [n, k/32]``, if ``extreme`` with scales that no kernel decodes fast; yet every
    linear is finite in float16.
    """
    weight = torch.randn(n, k).clamp_(-2, 2).to(torch.float8_e4m3fn)
    scale = torch.randint(122, 128, (n, k // 32), dtype=torch.uint8)
    if extreme:
        scale[0], scale[-1] = 1, 136
    return weight, scale
