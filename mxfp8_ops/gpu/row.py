"""Linear for one row of x on a packed weight, in Gluon: ``direct`` with x in shared memory.

A matrix instruction wants elements of x from a lane that lie 16 bytes apart. ``direct`` loads them four bytes at a
time, among the loads of the weight. Here a program first asks for all words of the weight that its registers hold, then
brings x to shared memory, in an order in which what a lane needs for 16 bytes of the weight are 16 bytes, and waits for
the weight only afterwards. K is a constant of the kernel and its turns are written out one after the other, which makes
most of a place part of an instruction. The mark is looked at when results have been stored.

So x has to fit into shared memory beside that of the other programs, and K has to be cut into whole turns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .direct import products as exact_products
from .fragments import place_of_mark
from .lanes import BLOCK, all_places, any_pairs, first_places, rows_operand, store, weight_operand
from .tiles import wait_for_kernel_before
from .versions import barrier


@gluon.jit
def mxfp8_linear_row(
    x,  # pointer [K / 2] int32: two elements in a word
    packed,  # pointer
    bias,  # pointer [N], or to anything
    out,  # pointer [N]
    N,
    K: gl.constexpr,
    TILES: gl.constexpr,  # of 8 outputs, in a program: 1 or 2
    WARPS: gl.constexpr,
    BLOCKS: gl.constexpr,  # of a warp in a turn
    FOR_FLOAT16: gl.constexpr,  # the weight was packed for x of float16
    HAS_BIAS: gl.constexpr,
):
    DTYPE: gl.constexpr = out.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    SIZES: gl.constexpr = (4, TILES, WARPS, BLOCKS)  # rows of x: as few as a matrix instruction has columns for
    wait_for_kernel_before()
    mark = place_of_mark(packed, N, K, DTYPE)
    total, marked = _products(x, packed, mark, K, SIZES, MMA, DTYPE, FOR_FLOAT16)
    store(total, bias, out, 1, N, SIZES, HAS_BIAS)
    if marked != 0:
        total, _ = exact_products(x, packed, mark, 1, K, SIZES, MMA, DTYPE, FOR_FLOAT16, True, True)
        store(total, bias, out, 1, N, SIZES, HAS_BIAS)


@gluon.jit
def _products(
    x,
    packed,
    mark,
    K: gl.constexpr,
    SIZES: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    FOR_FLOAT16: gl.constexpr,
):
    """Every warp's sums of its blocks, and what is written at ``mark``."""
    TOGETHER: gl.constexpr = SIZES[2] * SIZES[3]
    TURNS: gl.constexpr = K // (128 * TOGETHER)
    words, scales, _ = first_places(x, packed, 1, K, SIZES, MMA)
    words, scales = all_places(words, scales, SIZES, MMA)
    word = gl.load(words, eviction_policy="evict_first")
    codes = gl.load(scales)
    marked = gl.load(mark)
    shared = _in_shared_memory(x, K, SIZES[2])
    barrier()  # here, or the compiler would put it behind the next turn's loads
    total = gl.zeros([SIZES[2], SIZES[1] * 16, 2 * SIZES[0]], gl.float32, MMA)
    for turn in gl.static_range(TURNS):
        if turn + 1 < TURNS:
            next_word = gl.load(words + (turn + 1) * (TOGETHER * BLOCK), eviction_policy="evict_first")
            next_codes = gl.load(scales + (turn + 1) * (TOGETHER * BLOCK))
        weight = weight_operand(word, codes, SIZES, MMA, DTYPE, FOR_FLOAT16, False)
        pair = _pairs(shared.slice(turn * TOGETHER * 4, TOGETHER * 4), SIZES, MMA)
        total = mma_v2(weight, rows_operand(pair, SIZES, MMA, DTYPE), total)
        if turn + 1 < TURNS:
            word = next_word
            codes = next_codes
    return total, marked


@gluon.jit
def _in_shared_memory(x, K: gl.constexpr, WARPS: gl.constexpr):
    """Words of x ``[group of 32 elements, k21, k4 k3]``: the last two exchanged. The groups are a power of two."""
    WORDS: gl.constexpr = 1 << (K // 2 - 1).bit_length()
    LANE: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    shared = gl.allocate_shared_memory(gl.int32, [WORDS // 16, 4, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    place = gl.arange(0, WORDS, LANE)
    words = gl.load(x + place, mask=place < K // 2, other=0)
    shared.store(gl.permute(gl.reshape(words, [WORDS // 16, 4, 4]), (0, 2, 1)))
    return shared


@gluon.jit
def _pairs(shared, SIZES: gl.constexpr, MMA: gl.constexpr):
    """Pairs of elements of x ``[warp, column, block, k6, k4 k3, k21]`` of a turn, as ``rows_operand`` takes them. All
    columns of the same k5 are the row.
    """
    WARPS: gl.constexpr = SIZES[2]
    BLOCKS: gl.constexpr = SIZES[3]
    PAIR: gl.constexpr = any_pairs(SIZES, MMA).type.layout
    pairs = gl.full([WARPS, 8, BLOCKS, 2, 4, 4], 0, gl.int32, PAIR)
    pairs = gl.reshape(pairs, [WARPS, 2, 4, BLOCKS, 2, 4, 4])  # warp, k5, m, block, k6, k43, k21
    one = gl.max(pairs, 2)
    WORD: gl.constexpr = gl.reshape(gl.permute(one, (0, 2, 3, 1, 5, 4)), [WARPS * BLOCKS * 4, 4, 4]).type.layout
    words = gl.permute(gl.reshape(shared.load(WORD), [WARPS, BLOCKS, 2, 2, 4, 4]), (0, 3, 1, 2, 5, 4))
    words = gl.convert_layout(words, one.type.layout, assert_trivial=True)
    pairs, _ = gl.broadcast(gl.expand_dims(words, 2), pairs)
    return gl.convert_layout(gl.reshape(pairs, [WARPS, 8, BLOCKS, 2, 4, 4]), PAIR, assert_trivial=True)
