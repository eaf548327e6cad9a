"""Linear on a packed weight for very few rows of x, in Gluon: the weight goes from memory straight to registers.

A program computes 16 outputs for BM rows of x. Its warps take turns along K, a block of 128 elements each, and add up
their sums in the end. A lane reads four words at a time, the operands of two matrix instructions of 16 rows by 16
elements by 8 rows of x; x comes from the caches. Many small programs at once hide the latency of memory: nothing waits
for anything but its own loads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import group_scale, halves, needs_exact, operand, scaled, separate


@gluon.jit(do_not_specialize=["M"])
def kernel(
    x,  # pointer [M, K / 2] int32: two elements in a word
    packed,  # pointer
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    M,
    N,
    K,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    blocks = (K + 127) // 128
    words, scales = _load_weight(packed, 0, blocks, WARPS, A)  # on the way while the branch waits
    if needs_exact(packed, N, K, out.dtype.element_ty):
        total = _products(x, packed, out, words, scales, blocks, M, K, BM, WARPS, MMA, True)
    else:
        total = _products(x, packed, out, words, scales, blocks, M, K, BM, WARPS, MMA, False)
    total = gl.sum(total, 0)
    LAYOUT: gl.constexpr = gl.SliceLayout(0, MMA)
    n = gl.program_id(0) * 16 + gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
    m = gl.arange(0, BM, gl.SliceLayout(0, LAYOUT))[None, :]
    if HAS_BIAS:
        total += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0).to(gl.float32), 1)
    n = gl.expand_dims(n, 1)
    gl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=(m < M) & (n < N))


@gluon.jit
def _products(
    x,
    packed,
    out,
    words,
    scales,
    blocks,
    M,
    K,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    MMA: gl.constexpr,
    EXACT: gl.constexpr,
):
    """The sums ``[WARPS, 16, BM]`` of every warp's turns. The weight of the next turn is loaded ahead."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    total = gl.zeros([WARPS, 16, BM], gl.float32, MMA)
    last = (blocks - 1) // WARPS * WARPS
    for first in range(0, last, WARPS):
        next_words, next_scales = _load_weight(packed, first + WARPS, blocks, WARPS, A)
        rows = _load_x(x, first, M, K, BM, WARPS, B, DTYPE, False)
        total = mma_v2(_decode(words, scales, WARPS, A, DTYPE, EXACT), rows, total)
        words = next_words
        scales = next_scales
    rows = _load_x(x, last, M, K, BM, WARPS, B, DTYPE, True)
    if EXACT:  # a block that is none may hold a NaN, which zeros of x do not silence
        WORD: gl.constexpr = words.type.layout
        BOTH: gl.constexpr = scales.type.layout
        words = gl.where(last + _range(WARPS, 0, 6, WORD) < blocks, words, 0)
        scales = gl.where(last + _range(WARPS, 0, 3, BOTH) < blocks, scales, 0)
    return mma_v2(_decode(words, scales, WARPS, A, DTYPE, EXACT), rows, total)


@gluon.jit
def _load_weight(packed, first, blocks, WARPS: gl.constexpr, A: gl.constexpr):
    """A block for each warp: its words ``[warp, r210, k6, k5, k4 k3, k21]`` and the words of its scales ``[warp, r210,
    r3]``. Past the last block, that one again: x is zero there.
    """
    WORD: gl.constexpr = _any_words(WARPS, A).type.layout
    tile = gl.program_id(0)  # of 16 rows: r6, r5, r4
    block = gl.minimum(first + _range(WARPS, 0, 6, WORD), blocks - 1)
    place = (tile // 8 * blocks + block) * (132 * 32) + tile % 8 // 4 * 1024 + tile % 4 * 128
    place += _range(8, 1, 6, WORD) * 16 + _range(2, 2, 6, WORD) * 2048 + _range(2, 3, 6, WORD) * 512
    place += _range(4, 4, 6, WORD) + _range(4, 5, 6, WORD) * 4
    words = gl.load(packed + place, eviction_policy="evict_first")

    ROW: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, WORD))))
    row = gl.full([WARPS, 8], 0, gl.int32, ROW)
    BOTH: gl.constexpr = gl.join(row, row).type.layout
    block = gl.minimum(first + _range(WARPS, 0, 3, BOTH), blocks - 1)
    place = (tile // 8 * blocks + block) * (132 * 32) + 4096 + tile % 8 * 16
    scales = gl.load(packed + place + _range(8, 1, 3, BOTH) * 2 + _range(2, 2, 3, BOTH))
    return words, scales


@gluon.jit
def _load_x(
    x,
    first,
    M,
    K,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    B: gl.constexpr,
    DTYPE: gl.constexpr,
    LAST: gl.constexpr,
):
    """The rows of x ``[WARPS, 128, BM]`` that go with a block for each warp. Rows past M are the last row."""
    X: gl.constexpr = _any_pairs(WARPS, BM, B).type.layout
    pair = (first + _range(WARPS, 0, 3, X)) * 64 + _range(64, 2, 3, X)
    place = gl.minimum(_range(BM, 1, 3, X), M - 1) * (K // 32 * 16) + pair
    if LAST:
        pairs = gl.load(x + place, mask=pair < K // 2, other=0)
    else:
        pairs = gl.load(x + place)
    one, other = halves(pairs)
    rows = gl.permute(gl.reshape(gl.join(one, other), [WARPS, BM, 128]), (0, 2, 1))
    return gl.convert_layout(rows.to(DTYPE, bitcast=True), B, assert_trivial=True)


@gluon.jit
def _decode(words, scales, WARPS: gl.constexpr, A: gl.constexpr, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """The weight ``[WARPS, 16, 128]``."""
    one, other = gl.split(scales)
    pair_one, pair_other = separate(words, DTYPE, EXACT)
    pair_one = scaled(pair_one, _four_scales(one, words, DTYPE, EXACT), DTYPE, EXACT)
    pair_other = scaled(pair_other, _four_scales(other, words, DTYPE, EXACT), DTYPE, EXACT)
    return operand(pair_one, pair_other, [WARPS, 16, 128], A, DTYPE)


@gluon.jit
def _four_scales(scales, words, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """What the elements of each word are multiplied by: the scales of the groups k6, k5."""
    first = group_scale(scales, 0, DTYPE, EXACT)
    second = group_scale(scales, 1, DTYPE, EXACT)
    third = group_scale(scales, 2, DTYPE, EXACT)
    fourth = group_scale(scales, 3, DTYPE, EXACT)
    GROUP: gl.constexpr = gl.SliceLayout(4, gl.SliceLayout(5, words.type.layout))
    groups = gl.join(gl.join(first, third), gl.join(second, fourth))  # warp, r210, k6, k5
    groups = gl.convert_layout(groups, GROUP, assert_trivial=True)
    groups, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(groups, 4), 5), words)
    return groups


@gluon.jit
def _any_words(WARPS: gl.constexpr, A: gl.constexpr):
    """Some words in the layout that makes decoded elements lie as A wants them."""
    tile = gl.full([WARPS, 16, 128], 0, gl.int8, A)
    bits = gl.reshape(tile, [WARPS, 2, 8, 2, 2, 4, 4, 2])  # warp, r3, r210, k6, k5, k43, k21, k0
    rows, _ = gl.split(gl.permute(bits, (0, 2, 3, 4, 5, 6, 1, 7)))
    word, _ = gl.split(rows)
    return word


@gluon.jit
def _any_pairs(WARPS: gl.constexpr, BM: gl.constexpr, B: gl.constexpr):
    """Some pairs of elements of x in the layout that makes them lie as B wants them."""
    rows = gl.permute(gl.full([WARPS, 128, BM], 0, gl.int8, B), (0, 2, 1))
    pair, _ = gl.split(gl.reshape(rows, [WARPS, BM, 64, 2]))
    return pair


@gluon.jit
def _range(size: gl.constexpr, dim: gl.constexpr, rank: gl.constexpr, LAYOUT: gl.constexpr):
    """0 .. size - 1 along one dimension of a tensor of that rank and layout."""
    places = gl.arange(0, size, _along(dim, rank, LAYOUT))
    for other in gl.static_range(rank):
        if other != dim:
            places = gl.expand_dims(places, other)
    return places


@gluon.constexpr_function
def _along(dim, rank, layout):
    for other in reversed(range(rank)):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout
