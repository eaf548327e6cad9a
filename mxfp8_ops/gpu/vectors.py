"""Linear for two to sixteen rows of x on a weight as it is stored, in Gluon: both go from memory straight to registers.

A matrix instruction does not care which elements of K a lane holds, if only both operands agree. So a lane takes 16
consecutive codes of a row, four lanes 64 bytes of it, and the same elements of x: see ``mma_layouts``. Warps stand
along K, each with a block of 128 elements or two in a turn, and nothing waits for anything but its own loads; x comes
from the caches.

16 outputs and eight rows of x fill an instruction. But programs of eight outputs are twice as many, and four rows of x
need half as many loads: there the two halves of a turn share an instruction (GROUPS = 2), and the products of one half
with the other are thrown away in the end.

For chips that convert e4m3 themselves: NVIDIA's from sm_89 on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .. import settings
from .fragments import each_twice, halves, scale_to_float32
from .kinds_few import Vectors
from .launch import launch
from .mma_layouts import (
    first_places,
    group_layout,
    places_in_turn,
    weight_layout,
    weight_operand,
    x_layout,
    x_operand,
)
from .places import places_along
from .plans_vectors import kinds, plan
from .scaled_codes import elements_by_float32, factors_of_scales, scaled_elements
from .tune import best
from .warp_sums import sum_of_warps


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, processors: int, by_float32: bool) -> Tensor:
    """``x [M, K]`` bfloat16 or float16 with 1 <= M <= 16, ``weight [N, K]``, ``scale [N, K/32]``, ``bias [N]``, all
    contiguous, the first three at multiples of 16 bytes; gives ``[M, N]``. ``by_float32``: for a chip before sm_90.
    """
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    chosen = plan(m, n, k, processors)
    if settings.autotune():
        problem = m, n, k, x.dtype
        chosen = best(
            "vectors", problem, kinds(m, k), chosen, lambda each: run(each, x, weight, scale, bias, out, by_float32)
        )
    run(chosen, x, weight, scale, bias, out, by_float32)
    return out


def run(
    kind: Vectors,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    by_float32: bool = False,
) -> None:
    """The same by a kind that takes as many rows, to ``out [M, N]``. Weight and scale may also be given as int32."""
    (m, k), n = x.shape, out.shape[1]
    scales = scale.view(torch.int32) if k % 128 == 0 else scale
    launch(
        mxfp8_linear_vectors,
        (kind.programs(n),),
        (x.view(torch.int32), weight.view(torch.int32), scales, x if bias is None else bias, out, m, n, k),
        (*kind.constants, k % (128 * kind.together) != 0, by_float32, bias is not None),
        num_warps=kind.warps,
        maxnreg=kind.registers,
    )


@gluon.jit(do_not_specialize=["M"])
def mxfp8_linear_vectors(
    x,  # pointer [M, K / 2] int32: two elements in a word
    weight,  # pointer [N, K / 4] int32: four elements in a word
    scale,  # pointer [N, K / 128] int32: four codes in a word; or [N, K / 32] uint8
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N], of x's dtype
    M,
    N,
    K,
    ROWS: gl.constexpr,  # 4, 8 or 16, at least M
    OUTPUTS: gl.constexpr,  # of a program: 8 or 16
    GROUPS: gl.constexpr,  # 2, if OUTPUTS are 8 or ROWS are 4
    WARPS: gl.constexpr,
    BLOCKS: gl.constexpr,  # of a warp in a turn
    RAGGED_K: gl.constexpr,  # K is no multiple of what the warps take in a turn
    BY_FLOAT32: gl.constexpr,  # elements are decoded as chips before sm_90 can
    HAS_BIAS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    DTYPE: gl.constexpr = out.dtype.element_ty
    TOGETHER: gl.constexpr = WARPS * BLOCKS * 128
    HELD: gl.constexpr = 128 if scale.dtype.element_ty == gl.int32 else 32  # elements whose scales are an item
    SIZES: gl.constexpr = (ROWS, OUTPUTS, GROUPS, WARPS, BLOCKS * 128)  # the last: BK, elements of a warp's turn
    first = gl.program_id(0) * OUTPUTS
    total = gl.zeros([WARPS, OUTPUTS * GROUPS, ROWS * GROUPS], gl.float32, MMA)
    words, scales, pairs = _first_turn(x, weight, scale, first, M, N, K, HELD, SIZES, MMA)
    for _ in range(K // TOGETHER):
        total = _turn(words, scales, pairs, 0, total, HELD, SIZES, MMA, DTYPE, BY_FLOAT32, False)
        words += TOGETHER // 4
        scales += TOGETHER // HELD
        pairs += TOGETHER // 2
    if RAGGED_K:  # a block of each warp in a turn, so that all have something to do as long as possible
        REST: gl.constexpr = (ROWS, OUTPUTS, GROUPS, WARPS, 128)
        done = K // TOGETHER * TOGETHER
        rest = (x + done // 2, weight + done // 4, scale + done // HELD)
        words, scales, pairs = _first_turn(rest[0], rest[1], rest[2], first, M, N, K, HELD, REST, MMA)
        for left in range((K - done) // 32, 0, -4 * WARPS):
            total = _turn(words, scales, pairs, left, total, HELD, REST, MMA, DTYPE, BY_FLOAT32, True)
            words += WARPS * 32
            scales += WARPS * 128 // HELD
            pairs += WARPS * 64
    _store(sum_of_warps(total), bias, out, first, M, N, SIZES, HAS_BIAS)


@gluon.jit
def _first_turn(x, weight, scale, first, M, N, K, HELD: gl.constexpr, SIZES: gl.constexpr, MMA: gl.constexpr):
    """Where each lane finds its words of the weight, its scales and its pairs of x in the first turn."""
    ROWS: gl.constexpr = SIZES[0]
    OUTPUTS: gl.constexpr = SIZES[1]
    GROUPS: gl.constexpr = SIZES[2]
    WARPS: gl.constexpr = SIZES[3]
    BK: gl.constexpr = SIZES[4]
    WORD: gl.constexpr = weight_layout(4, OUTPUTS, BK, MMA, GROUPS)
    words = first_places(weight, first, N, K, WARPS, OUTPUTS, BK, 4, WORD)
    scales = first_places(scale, first, N, K, WARPS, OUTPUTS, BK, HELD, group_layout(WORD, HELD))
    pairs = first_places(x, 0, M, K, WARPS, ROWS, BK, 2, x_layout(2, ROWS, BK, MMA, GROUPS))
    return words, scales, pairs


@gluon.jit
def _turn(
    words,
    scales,
    pairs,
    left,  # groups of 32 elements of K, if RAGGED
    total,
    HELD: gl.constexpr,
    SIZES: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    BY_FLOAT32: gl.constexpr,
    RAGGED: gl.constexpr,
):
    """Adds the products of a turn to each warp's total. RAGGED: K may end before."""
    GROUPS: gl.constexpr = SIZES[2]
    WARPS: gl.constexpr = SIZES[3]
    BK: gl.constexpr = SIZES[4]
    WORD: gl.constexpr = words.type.layout
    SCALE: gl.constexpr = scales.type.layout
    PAIR: gl.constexpr = pairs.type.layout
    if RAGGED:
        group = places_in_turn(WARPS, BK, 4, WORD) // 8
        word = gl.load(words, mask=group < left, other=0, eviction_policy="evict_first")
        group = places_in_turn(WARPS, BK, HELD, SCALE) * (HELD // 32)
        codes = gl.load(scales, mask=group < left, other=0)
        group = places_in_turn(WARPS, BK, 2, PAIR) // 16
        pair = gl.load(pairs, mask=group < left, other=0)
    else:
        word = gl.load(words, eviction_policy="evict_first")
        codes = gl.load(scales)
        pair = gl.load(pairs)
    weight = _weight_operand(word, codes, HELD, SIZES, MMA, DTYPE, BY_FLOAT32)
    return mma_v2(weight, x_operand(pair, MMA, DTYPE, GROUPS), total)


@gluon.jit
def _weight_operand(
    word,
    codes,
    HELD: gl.constexpr,
    SIZES: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    BY_FLOAT32: gl.constexpr,
):
    """Words ``[WARPS, OUTPUTS, BK / 4]`` and their scales ``[WARPS, OUTPUTS, BK / HELD]`` as operand A."""
    OUTPUTS: gl.constexpr = SIZES[1]
    GROUPS: gl.constexpr = SIZES[2]
    WARPS: gl.constexpr = SIZES[3]
    BK: gl.constexpr = SIZES[4]
    # A block of 128 elements is two chunks for four lanes, of which two have the first 32 elements of a chunk.
    words = gl.reshape(word, [WARPS, OUTPUTS, BK // 128, 2, 2, 8])
    if BY_FLOAT32:
        scales = scale_to_float32(_codes_of_groups(codes, words, HELD))
        elements = elements_by_float32(words, _of_groups(scales, words), DTYPE)
    else:
        if HELD == 128:
            one, other = factors_of_scales(_codes_of_chunks(codes, words), DTYPE)
            one, other = _of_both_chunks(one, words), _of_both_chunks(other, words)
        else:
            one, other = factors_of_scales(_codes_of_groups(codes, words, HELD) * 0x00010001, DTYPE)
            one, other = _of_groups(one, words), _of_groups(other, words)
        low, high = halves(words)
        elements = halves(scaled_elements(low, one, other, DTYPE)) + halves(scaled_elements(high, one, other, DTYPE))
    return weight_operand(elements, [WARPS, OUTPUTS, BK], MMA, DTYPE, GROUPS)


@gluon.jit
def _codes_of_groups(codes, words, HELD: gl.constexpr):
    """The codes ``[WARPS, OUTPUTS, BK / 128, chunk, group of a chunk]``, from words of four or bytes."""
    if HELD == 128:
        LAYOUT: gl.constexpr = words.type.layout
        number = places_along(2, 3, 6, LAYOUT) * 2 + places_along(2, 4, 6, LAYOUT)
        codes = (_of_blocks(codes, words) >> (8 * number)) & 0xFF
    return gl.reshape(codes.to(gl.int32), words.shape[:5])


@gluon.jit
def _codes_of_chunks(codes, words):
    """Of words of the four codes of a block, those of a lane's group in either chunk, in the halves of a word."""
    LAYOUT: gl.constexpr = words.type.layout
    return (_of_blocks(codes, words) >> (8 * places_along(2, 4, 6, LAYOUT))) & 0x00FF00FF


@gluon.jit
def _of_blocks(codes, words):
    """Words of codes ``[WARPS, OUTPUTS, BK / 128]`` with as many dimensions as ``words``."""
    ITEM: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, words.type.layout)))
    codes = gl.convert_layout(codes, ITEM, assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(codes, 3), 4), 5)


@gluon.jit
def _of_both_chunks(factors, words):
    """What words are multiplied by: the lower half of factors, twice, in the first chunk, the upper in the second."""
    first, second = each_twice(factors)
    factors = gl.permute(gl.join(first, second), (0, 1, 2, 3, 6, 4, 5))
    return _of_groups(gl.reshape(factors, words.shape[:5]), words)


@gluon.jit
def _of_groups(factors, words):
    """The same from a factor for each group of 32 elements."""
    GROUP: gl.constexpr = gl.SliceLayout(5, words.type.layout)
    factors = gl.convert_layout(factors, GROUP, assert_trivial=True)
    factors, _ = gl.broadcast(gl.expand_dims(factors, 5), words)
    return factors


@gluon.jit
def _store(total, bias, out, first, M, N, SIZES: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Stores sums ``[OUTPUTS * GROUPS, ROWS * GROUPS]`` plus bias, those of a half of K with the same half alone."""
    ROWS: gl.constexpr = SIZES[0]
    OUTPUTS: gl.constexpr = SIZES[1]
    GROUPS: gl.constexpr = SIZES[2]
    if GROUPS == 2:
        parts = gl.reshape(total, [OUTPUTS // 8, 2, 8, ROWS // 4, 2, 4])
        SAME: gl.constexpr = parts.type.layout
        parts = gl.where(places_along(2, 1, 6, SAME) == places_along(2, 4, 6, SAME), parts, 0.0)
        total = gl.reshape(gl.sum(gl.sum(parts, 4), 1), [OUTPUTS, ROWS])
    LAYOUT: gl.constexpr = total.type.layout
    n = first + places_along(OUTPUTS, 0, 2, LAYOUT)
    m = places_along(ROWS, 1, 2, LAYOUT)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n < N, other=0).to(gl.float32)
    gl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=(m < M) & (n < N))
