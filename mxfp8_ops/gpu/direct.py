"""Linear on a packed weight for one to eight rows of x, in Gluon: the weight goes from memory straight to registers.

A lane that reads 16 bytes of a packed weight holds elements of two rows, r and r + 8, as a tensor core wants them in
operand A: 16 rows of 16 elements, times eight columns of operand B. With so few rows of x most columns would be empty.
So the eight pairs of rows of A are four pairs of rows of the weight, at two groups of 32 elements of K (k5 = 0 and 1),
and eight columns of B are four rows of x at the same two groups. The products of one group with the other are thrown
away in the end.

That makes small programs of one or two tiles of 8 outputs, whose warps stand along K with four or more loads of 16
bytes in flight in every lane. So many bytes are on the way at once that reading the weight costs little more than its
bytes; nothing waits for anything but its own loads, and x comes from the caches: two tiles share what they load of it.
All programs begin at about the same time, and so does what they do before their first load and after their last: it
counts as much as the loop, and is as short as can be.

Where a code needs exact decoding, the program computes its outputs again: it looks at the mark after the loop. It loads
the mark in the loop, since the compiler would compare a mark that is loaded before right there, and wait for it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import place_of_mark
from .lanes import (
    BLOCK,
    all_places,
    any_pairs,
    any_scales,
    any_words,
    first_places,
    rows_operand,
    store,
    weight_operand,
)
from .places import places_along
from .tiles import wait_for_kernel_before


@gluon.jit(do_not_specialize=["M"])
def mxfp8_linear_direct(
    x,  # pointer [M, K / 2] int32: two elements in a word
    packed,  # pointer
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    M,
    N,
    K,
    ROWS: gl.constexpr,  # 4 or 8, at least M
    TILES: gl.constexpr,  # of 8 outputs, in a program: 1 or 2
    WARPS: gl.constexpr,
    BLOCKS: gl.constexpr,  # of a warp in a turn
    RAGGED_K: gl.constexpr,  # K is no multiple of what the warps take in a turn
    FOR_FLOAT16: gl.constexpr,  # the weight was packed for x of float16
    HAS_BIAS: gl.constexpr,
):
    DTYPE: gl.constexpr = out.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    wait_for_kernel_before()
    mark = place_of_mark(packed, N, K, DTYPE)
    SIZES: gl.constexpr = (ROWS, TILES, WARPS, BLOCKS)
    total, marked = products(x, packed, mark, M, K, SIZES, MMA, DTYPE, FOR_FLOAT16, RAGGED_K, False)
    if marked != 0:
        total, _ = products(x, packed, mark, M, K, SIZES, MMA, DTYPE, FOR_FLOAT16, True, True)
    store(total, bias, out, M, N, SIZES, HAS_BIAS)


@gluon.jit
def products(
    x,
    packed,
    mark,
    M,
    K,
    SIZES: gl.constexpr,  # rows, tiles, warps, blocks
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    FOR_FLOAT16: gl.constexpr,
    RAGGED: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Every warp's sums ``[WARPS, TILES * 16, 2 * ROWS]`` of its blocks, and what is written at ``mark``."""
    ROWS: gl.constexpr = SIZES[0]
    TILES: gl.constexpr = SIZES[1]
    TOGETHER: gl.constexpr = SIZES[2] * SIZES[3]
    total = gl.zeros([SIZES[2], TILES * 16, 2 * ROWS], gl.float32, MMA)
    marked = 0
    done = 0
    if not EXACT:  # which is rare: all of K is left to the second loop
        words, scales, pairs = first_places(x, packed, M, K, SIZES, MMA)
        for _ in range(K // (TOGETHER * 128)):
            total, marked = _turn(words, scales, pairs, mark, 0, total, SIZES, MMA, DTYPE, FOR_FLOAT16, False, False)
            words += TOGETHER * BLOCK
            scales += TOGETHER * BLOCK
            pairs += TOGETHER * 64
        done = K // (TOGETHER * 128) * TOGETHER
    if RAGGED:  # a block of each warp in a turn, so that all have something to do as long as possible
        REST: gl.constexpr = (ROWS, TILES, SIZES[2], 1)
        words, scales, pairs = first_places(x + done * 64, packed + done * BLOCK, M, K, REST, MMA)
        for left in range(K // 32 - done * 4, 0, -4 * SIZES[2]):
            total, marked = _turn(words, scales, pairs, mark, left, total, REST, MMA, DTYPE, FOR_FLOAT16, True, EXACT)
            words += SIZES[2] * BLOCK
            scales += SIZES[2] * BLOCK
            pairs += SIZES[2] * 64
    return total, marked


@gluon.jit
def _turn(
    words,
    scales,
    pairs,
    mark,
    left,  # groups of K, if RAGGED
    total,
    SIZES: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    FOR_FLOAT16: gl.constexpr,
    RAGGED: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Adds the products of some blocks of each warp to its total, and looks at ``mark``. RAGGED: K may end before.

    It reads words ``[warp, tile, pair, block, k6, k4 k3, k21]``, words of scales ``[warp, tile, pair, block, r3]`` and
    pairs of x ``[warp, column, block, k6, k4 k3, k21]``. A pair of rows is k5, r1, r0; a column the higher bits of m,
    k5, and m's lower two.
    """
    ROWS: gl.constexpr = SIZES[0]
    WARPS: gl.constexpr = SIZES[2]
    BLOCKS: gl.constexpr = SIZES[3]
    WORD: gl.constexpr = any_words(SIZES, MMA).type.layout
    BOTH: gl.constexpr = any_scales(SIZES, MMA).type.layout
    X: gl.constexpr = any_pairs(SIZES, MMA).type.layout
    words, scales = all_places(words, scales, SIZES, MMA)
    pairs += places_along(BLOCKS, 2, 6, X) * 64 + places_along(2, 3, 6, X) * 32 + places_along(4, 4, 6, X) * 4
    if RAGGED:
        group = (places_along(WARPS, 0, 7, WORD) * BLOCKS + places_along(BLOCKS, 3, 7, WORD)) * 4
        group += places_along(2, 4, 7, WORD) * 2 + places_along(8, 2, 7, WORD) // 4
        word = gl.load(words, mask=group < left, other=0, eviction_policy="evict_first")
        group = (places_along(WARPS, 0, 5, BOTH) * BLOCKS + places_along(BLOCKS, 3, 5, BOTH)) * 4
        codes = gl.load(scales, mask=group < left, other=0)
        group = (places_along(WARPS, 0, 6, X) * BLOCKS + places_along(BLOCKS, 2, 6, X)) * 4
        group += places_along(2, 3, 6, X) * 2 + places_along(2 * ROWS, 1, 6, X) % 8 // 4
        pair = gl.load(pairs, mask=group < left, other=0)
    else:
        word = gl.load(words, eviction_policy="evict_first")
        codes = gl.load(scales)
        pair = gl.load(pairs)
    marked = gl.load(mark)
    weight = weight_operand(word, codes, SIZES, MMA, DTYPE, FOR_FLOAT16, EXACT)
    return mma_v2(weight, rows_operand(pair, SIZES, MMA, DTYPE), total), marked
