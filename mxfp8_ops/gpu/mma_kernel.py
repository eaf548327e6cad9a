"""Linear on a weight as it is stored, for up to some 64 rows of x, in Gluon: as fast as the weight can be read.

A program computes BN outputs for BM rows of x. Its warps stand ALONG K and ACROSS N; those along K take turns, of BK
elements each, and add up their sums in the end. Weight and x are copied to shared memory some turns ahead, where so
many rows of x leave no registers for what is on its way. The matrix instruction does not care which elements of K a
lane holds, if only both operands agree: so a lane takes 16 consecutive elements of a row, which are loaded together,
where the instruction's own order has pairs.

For chips that convert e4m3 themselves: NVIDIA's from sm_89 on. For fewer rows there is ``vectors``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .fragments import scale_to_float32
from .mma_layouts import (
    copy_layout,
    first_places,
    group_layout,
    places_in_turn,
    swizzled,
    weight_layout,
    weight_operand,
    x_layout,
    x_operand,
)
from .places import places_along
from .scaled_codes import elements_by_float32
from .versions import copy_to_shared
from .warp_sums import sum_of_warps


@gluon.jit(do_not_specialize=["M", "N"])
def mxfp8_linear_mma(
    x,  # pointer [M, K / 2] int32: two elements in a word
    weight,  # pointer [N, K / 4] int32: four elements in a word
    scale,  # pointer [N, K / 32]
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N], or float32 [programs along axis 1, M, N]
    M,
    N,
    K,
    DTYPE: gl.constexpr,  # of x
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,  # elements of K in a warp's turn
    ALONG: gl.constexpr,  # warps along K
    ACROSS: gl.constexpr,  # warps along N
    STAGES: gl.constexpr,  # in shared memory
    HAS_BIAS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [ALONG, ACROSS, 1], [1, 16, 8])
    tile = gl.program_id(0)
    down = (M + BM - 1) // BM
    row = tile % down * BM  # tiles with the same rows of the weight follow each other: it is in the cache then
    column = tile // down * BN
    turns = K // (ALONG * BK)  # without the rest
    first = turns * gl.program_id(1) // gl.num_programs(1)
    last = turns * (gl.program_id(1) + 1) // gl.num_programs(1)
    total = _staged(x, weight, scale, M, N, K, row, column, first, last, DTYPE, BN, BM, BK, STAGES, MMA)
    if (K % (ALONG * BK) != 0) & (gl.program_id(1) == gl.num_programs(1) - 1):
        total = _rest(x, weight, scale, M, N, K, row, column, turns, total, DTYPE, BN, BM, BK, MMA)
    total = sum_of_warps(total)
    LAYOUT: gl.constexpr = total.type.layout
    n = column + places_along(BN, 0, 2, LAYOUT)
    m = row + places_along(BM, 1, 2, LAYOUT)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n < N, other=0).to(gl.float32)
    place = (gl.program_id(1) * M + m).to(gl.int64) * N + n
    gl.store(out + place, total.to(out.dtype.element_ty), mask=(m < M) & (n < N))


@gluon.jit
def _staged(
    x,
    weight,
    scale,
    M,
    N,
    K,
    row,
    column,
    first,
    last,
    DTYPE: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    MMA: gl.constexpr,
):
    """The sums ``[ALONG, BN, BM]`` of each warp's turns. Weight and x are copied to shared memory STAGES - 1 turns
    ahead. Scales are few: those of the next turn wait in registers.
    """
    ALONG: gl.constexpr = MMA.warps_per_cta[0]
    WORD: gl.constexpr = weight_layout(4, BN, BK, MMA)
    PAIR: gl.constexpr = x_layout(2, BM, BK, MMA)
    scales = first_places(scale, column, N, K, ALONG, BN, BK, 32, group_layout(WORD))
    words = first_places(weight, column, N, K, ALONG, BN, BK, 4, copy_layout(4, BK, MMA))
    pairs = first_places(x, row, M, K, ALONG, BM, BK, 2, copy_layout(2, BK, MMA))
    word_stages = gl.allocate_shared_memory(gl.int32, [STAGES, ALONG, BN, BK // 4], swizzled(4, BK))
    pair_stages = gl.allocate_shared_memory(gl.int32, [STAGES, ALONG, BM, BK // 2], swizzled(2, BK))
    for i in gl.static_range(STAGES - 1):
        _copy(words, pairs, word_stages.index(i), pair_stages.index(i), first + i, last)
    next_code = gl.load(scales + first * (ALONG * BK // 32), mask=first < last, other=0)
    total = gl.zeros([ALONG, BN, BM], gl.float32, MMA)
    for turn in range(first, last):
        code = next_code
        next_code = gl.load(scales + (turn + 1) * (ALONG * BK // 32), mask=turn + 1 < last, other=0)
        async_copy.wait_group(STAGES - 2)
        stage = (turn - first) % STAGES
        word = word_stages.index(stage).load(WORD)
        pair = pair_stages.index(stage).load(PAIR)
        total = mma_v2(_weight_operand(word, code, MMA, DTYPE), x_operand(pair, MMA, DTYPE), total)
        free = (turn - first + STAGES - 1) % STAGES
        _copy(words, pairs, word_stages.index(free), pair_stages.index(free), turn + STAGES - 1, last)
    async_copy.wait_group(0)  # copies of turns that there are not write zeros: not into what is stored here next
    return total


@gluon.jit
def _copy(words, pairs, word_stage, pair_stage, turn, last):
    """Has a turn's words and pairs copied to a stage, if there is such a turn."""
    WORDS: gl.constexpr = word_stage.shape[0] * word_stage.shape[2]
    PAIRS: gl.constexpr = pair_stage.shape[0] * pair_stage.shape[2]
    copy_to_shared(word_stage, words + turn * WORDS, mask=turn < last)
    copy_to_shared(pair_stage, pairs + turn * PAIRS, mask=turn < last)
    async_copy.commit_group()


@gluon.jit
def _rest(
    x,
    weight,
    scale,
    M,
    N,
    K,
    row,
    column,
    turns,
    total,
    DTYPE: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
    MMA: gl.constexpr,
):
    """Adds what is left of K after so many turns: part of a turn, of which some warps get nothing."""
    ALONG: gl.constexpr = MMA.warps_per_cta[0]
    WORD: gl.constexpr = weight_layout(4, BN, BK, MMA)
    GROUP: gl.constexpr = group_layout(WORD)
    PAIR: gl.constexpr = x_layout(2, BM, BK, MMA)
    left = K - turns * (ALONG * BK)
    words = first_places(weight, column, N, K, ALONG, BN, BK, 4, WORD)
    scales = first_places(scale, column, N, K, ALONG, BN, BK, 32, GROUP)
    pairs = first_places(x, row, M, K, ALONG, BM, BK, 2, PAIR)
    word = gl.load(words + turns * (ALONG * BK // 4), mask=places_in_turn(ALONG, BK, 4, WORD) < left // 4, other=0)
    code = gl.load(scales + turns * (ALONG * BK // 32), mask=places_in_turn(ALONG, BK, 32, GROUP) < left // 32, other=0)
    pair = gl.load(pairs + turns * (ALONG * BK // 2), mask=places_in_turn(ALONG, BK, 2, PAIR) < left // 2, other=0)
    return mma_v2(_weight_operand(word, code, MMA, DTYPE), x_operand(pair, MMA, DTYPE), total)


@gluon.jit
def _weight_operand(words, codes, MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Words ``[ALONG, BN, BK / 4]`` and codes of scales ``[ALONG, BN, BK / 32]`` decoded, as operand A."""
    ALONG: gl.constexpr = words.shape[0]
    BN: gl.constexpr = words.shape[1]
    BK: gl.constexpr = words.shape[2] * 4
    by_group = gl.reshape(words, [ALONG, BN, BK // 32, 8])
    scales, _ = gl.broadcast(gl.expand_dims(scale_to_float32(codes.to(gl.int32)), 3), by_group)
    scales = gl.convert_layout(gl.reshape(scales, words.shape), words.type.layout, assert_trivial=True)
    return weight_operand(elements_by_float32(words, scales, DTYPE), [ALONG, BN, BK], MMA, DTYPE)
