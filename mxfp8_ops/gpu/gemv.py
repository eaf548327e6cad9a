"""Linear for a few rows of x in Triton: about as fast as the weight's bytes can be read.

Each program computes some outputs. A lane reads 16 consecutive elements of a row of the weight, turns them into
float32 in registers and adds up 16 products before anything is exchanged between lanes, so that the loop is loads
and arithmetic alone.

The scale multiplies the sum of 16 products rather than each element. That is the reference's answer unless the
element would have been rounded or have become infinite in x's dtype, for which the scale is taken for NaN, or the sum
overflows before it is scaled. The scales of real weights are so small that elements are rounded in float16: there each
is multiplied as one. Where a result is NaN or infinite the outputs are computed once more, element by element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import element_to_float32, scale_to_float32
from .launch import launch

MAX_ROWS = 8
ROWS_A_PROGRAM = 4

FAST_SCALES = {torch.bfloat16: (3, 246), torch.float16: (103, 142), torch.float32: (1, 246)}
"""Scale bytes with which nothing is computed once more, from the first to the last: of float16 all that it has itself,
of others those that are a normal power of two and under which every finite element is exact.
"""


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, native: bool) -> Tensor:
    """``x [M, K]`` contiguous with 1 <= M <= MAX_ROWS, ``weight [N, K]``, ``scale [N, K/32]``, ``bias [N]``; gives
    ``[M, N]``. ``native``: whether the device converts e4m3 itself.
    """
    m, k = x.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    codes = weight.contiguous()
    lowest, highest = FAST_SCALES[x.dtype]
    outputs, elements, warps = configuration(k, m)
    together = min(triton.next_power_of_2(m), ROWS_A_PROGRAM)
    constants = (together, bias is not None, native, lowest, highest, outputs, elements, min(elements, 256))
    launch(
        mxfp8_linear_gemv,
        (triton.cdiv(m, together) * triton.cdiv(n, outputs),),
        (
            x,
            codes if native else codes.view(torch.uint8),
            scale.contiguous(),
            x if bias is None else bias.contiguous(),
            out,
            m,
            n,
            k,
        ),
        constants,  # the last is small: what is rarely run should not cost the rest its registers
        num_warps=warps,
    )
    return out


def configuration(k: int, m: int) -> tuple[int, int, int]:
    """Outputs a program, elements of K a step, warps. Measured on an H100 over shapes from 1024x4096 to 8192x28672:
    more elements a lane cost registers, and so the warps that hide the latency of the loads.
    """
    elements = min(1024, triton.next_power_of_2(k))
    return (2, elements, max(1, elements // 512)) if m <= 2 else (4, elements, max(1, elements // 256))


@triton.jit
def mxfp8_linear_gemv(
    x,
    weight,
    scale,
    bias,
    out,
    rows,
    N,
    K,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EXACT_BK: tl.constexpr,
):
    # Programs with the same rows of the weight follow each other: the second finds them in the cache.
    parts = tl.cdiv(rows, M)
    row = tl.program_id(0) // parts * BN + tl.arange(0, BN)
    m = tl.program_id(0) % parts * M + tl.arange(0, M)
    # Rows past the end are computed like the last one, and not stored: loads without masks are faster.
    row_of_weight = tl.minimum(row, N - 1).to(tl.int64)
    row_of_x = tl.minimum(m, rows - 1)
    total = _products(x, weight, scale, row_of_x, row_of_weight, K, M, NATIVE, False, LOWEST, HIGHEST, BN, BK)
    special = (tl.abs(total) == float("inf")) | (total != total)
    if tl.max(tl.max(special.to(tl.int32), 1), 0) != 0:
        total = _products(x, weight, scale, row_of_x, row_of_weight, K, M, NATIVE, True, LOWEST, HIGHEST, BN, EXACT_BK)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < N).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * N + row[None, :], total, mask=(m < rows)[:, None] & (row < N)[None, :])


@triton.jit
def _products(
    x,
    weight,
    scale,
    row_of_x,
    row_of_weight,
    K,
    M: tl.constexpr,
    NATIVE: tl.constexpr,
    EXACT: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The products ``[M, BN]`` of x and of the weight; unless EXACT, NaN where a scale is not in LOWEST..HIGHEST."""
    k = tl.arange(0, BK)
    group = tl.arange(0, BK // 16)
    # K is a multiple of 32. Saying so keeps the loads 16 bytes wide.
    weights = weight + row_of_weight[:, None] * (K // 32 * 32) + k[None, :]
    scales = scale + row_of_weight[:, None] * (K // 32) + (group // 2)[None, :]
    xs = x + row_of_x[:, None] * (K // 32 * 32) + k[None, :]
    sums = tl.zeros((M, BN, BK // 16), tl.float32)
    for start in range(0, K // BK * BK, BK):
        code = tl.load(weights + start, eviction_policy="evict_first")
        power = tl.load(scales + start // 32).to(tl.int32)
        sums += _step(tl.load(xs + start), code, power, M, NATIVE, EXACT, LOWEST, HIGHEST, BN, BK)
    if K % BK != 0:
        start = K // BK * BK
        left = K - start
        code = tl.load(weights + start, mask=(k < left)[None, :])
        power = tl.load(scales + start // 32, mask=(group * 16 < left)[None, :], other=127).to(tl.int32)
        x_left = tl.load(xs + start, mask=(k < left)[None, :], other=0)
        sums += _step(x_left, code, power, M, NATIVE, EXACT, LOWEST, HIGHEST, BN, BK)
    return tl.sum(sums, 2)


@triton.jit
def _step(
    x,
    code,
    power,
    M: tl.constexpr,
    NATIVE: tl.constexpr,
    EXACT: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums of 16 products, ``[M, BN, BK/16]``. Sums are scaled, or elements if EXACT or for float16."""
    value = code.to(tl.float32) if NATIVE else element_to_float32(code)
    value = tl.reshape(value, (BN, BK // 16, 16))
    bits = tl.where((power >= LOWEST) & (power <= HIGHEST), power << 23, 0x7FC00000)
    scale = bits.to(tl.float32, bitcast=True)
    if EXACT:  # the weight has x's dtype
        value = (value * scale_to_float32(power)[:, :, None]).to(x.dtype).to(tl.float32)
    elif x.dtype == tl.float16:
        value = (value.to(tl.float16) * scale.to(tl.float16)[:, :, None]).to(tl.float32)
    products = value[None, :, :, :] * tl.reshape(x.to(tl.float32), (M, 1, BK // 16, 16))
    sums = tl.sum(products, 3)
    if not EXACT and x.dtype != tl.float16:
        sums *= scale[None, :, :]
    return sums
