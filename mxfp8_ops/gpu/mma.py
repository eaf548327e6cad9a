"""Linear on a weight as it is stored, for up to some 64 rows of x: how the work is cut up, and its launch. See
``mma_kernel`` for the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from .launch import launch
from .mma_kernel import mxfp8_linear_mma

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ADDED_TOGETHER = 1024  # results of which a program adds up the parts


@dataclass(frozen=True)
class Plan:
    """How the work is cut up. For the kernel's constants see there."""

    outputs: int  # BN
    rows: int  # BM
    elements: int  # BK
    along: int
    across: int
    stages: int
    parts: int = 1  # of K, for programs of their own


def plan(m: int, n: int, k: int, processors: int) -> Plan:
    """How to multiply ``m`` rows of x by a weight ``[n, k]`` on a chip of as many multiprocessors: what was fastest on
    an H100 over weights from 1024x4096 to 28672x8192.
    """
    if m <= 32:
        return Plan(32, 32, 64, 4, 2, 4, _parts(n, 32, k, processors))
    return Plan(64, 64, 64, 2, 4, 4, _parts(n, 64, k, 2 * processors))


def _parts(n: int, outputs: int, k: int, processors: int) -> int:
    """As many as give every multiprocessor work, each 1024 elements of K at least."""
    tiles = triton.cdiv(n, outputs)
    return max(1, min(processors // tiles, k // 1024, 8))


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """``x [M, K]`` of bfloat16 or float16, ``weight [N, K]``, ``scale [N, K/32]``, ``bias [N]``, all contiguous, x and
    weight at multiples of 16 bytes; gives ``[M, N]``.
    """
    m, k = x.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = out if plan.parts == 1 else torch.empty((plan.parts, m, n), dtype=torch.float32, device=x.device)
    offset = x if bias is None else bias
    sizes = (plan.outputs, plan.rows, plan.elements, plan.along, plan.across, plan.stages)
    launch(
        mxfp8_linear_mma,
        (triton.cdiv(m, plan.rows) * triton.cdiv(n, plan.outputs), plan.parts),
        (x.view(torch.int32), weight.view(torch.int32), scale, offset, parts, m, n, k),
        (_DTYPES[x.dtype], *sizes, bias is not None and plan.parts == 1),
        num_warps=plan.along * plan.across,
    )
    if plan.parts > 1:
        launch(
            mxfp8_add_parts,
            (triton.cdiv(m * n, _ADDED_TOGETHER),),
            (parts, offset, out, m * n, n),
            (plan.parts, _ADDED_TOGETHER, bias is not None),
        )
    return out


@triton.jit
def mxfp8_add_parts(parts, bias, out, size, N, PARTS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Adds up ``parts [PARTS, M, N]``, of ``size`` = M * N each, in their order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + place, mask=place < size, other=0)
    if HAS_BIAS:
        total += tl.load(bias + place % N, mask=place < size, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)
