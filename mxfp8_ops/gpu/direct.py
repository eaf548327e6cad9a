"""Linear on a packed weight for one to eight rows of x, in Gluon: the weight goes from memory straight to registers.

A lane that reads 16 bytes of a packed weight holds elements of two rows, r and r + 8, as a tensor core wants them in
operand A: 16 rows of 16 elements, times eight columns of operand B. With so few rows of x most columns would be empty.
So the eight pairs of rows of A are four pairs of rows of the weight, at two groups of 32 elements of K (k5 = 0 and 1),
and eight columns of B are four rows of x at the same two groups. The products of one group with the other are thrown
away in the end.

That makes small programs of 8 outputs, whose warps stand along K with four loads of 16 bytes in flight in every lane.
So many bytes are on the way at once that reading the weight costs little more than its bytes; nothing waits for
anything but its own loads, and x comes from the caches.

Where a code needs exact decoding, the program computes its outputs again: it looks at the mark after the loop.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import float16_in_both_halves, halves, needs_exact, operand, scale_to_float32, scaled, separate

_BLOCK = gl.constexpr(132 * 32)  # words of 128 rows and 128 elements of K: see mxfp8_ops.packing
_BLOCKS = gl.constexpr(2)  # of a warp in a turn
_EXTRACT = gl.constexpr("prmt.b32 $0, $1, 0, $2;")  # bytes of $1 by number; number 4 is zero


@gluon.jit(do_not_specialize=["M"])
def kernel(
    x,  # pointer [M, K / 2] int32: two elements in a word
    packed,  # pointer
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    M,
    N,
    K,
    ROWS: gl.constexpr,  # 4 or 8, at least M
    WARPS: gl.constexpr,
    RAGGED_K: gl.constexpr,  # K is no multiple of what the warps take in a turn
    HAS_BIAS: gl.constexpr,
):
    DTYPE: gl.constexpr = out.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    exact = needs_exact(packed, N, K, DTYPE)  # on its way while the loop runs
    total = _products(x, packed, M, K, ROWS, WARPS, _BLOCKS, MMA, DTYPE, RAGGED_K, False)
    if exact:
        total = _products(x, packed, M, K, ROWS, WARPS, 1, MMA, DTYPE, True, True)
    total = _sums(total, ROWS, WARPS)
    LAYOUT: gl.constexpr = total.type.layout
    n = (
        gl.program_id(0) // 2 * 16
        + gl.program_id(0) % 2 * 4
        + places_along(2, 0, 3, LAYOUT) * 8
        + places_along(4, 1, 3, LAYOUT)
    )
    m = places_along(ROWS, 2, 3, LAYOUT)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n < N, other=0).to(gl.float32)
    gl.store(out + m * N + n, total.to(DTYPE), mask=(m < M) & (n < N))


@gluon.jit
def _products(
    x,
    packed,
    M,
    K,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    RAGGED: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Every warp's sums ``[WARPS, 16, 2 * ROWS]`` of its blocks."""
    words, scales, pairs = _places(x, packed, M, K, ROWS, WARPS, BLOCKS, MMA)
    total = gl.zeros([WARPS, 16, 2 * ROWS], gl.float32, MMA)
    whole = K // (WARPS * BLOCKS * 128) * (WARPS * BLOCKS)
    for first in range(0, whole, WARPS * BLOCKS):
        total = _turn(words, scales, pairs, first, K, total, ROWS, WARPS, BLOCKS, MMA, DTYPE, False, EXACT)
    if RAGGED:
        total = _turn(words, scales, pairs, whole, K, total, ROWS, WARPS, BLOCKS, MMA, DTYPE, True, EXACT)
    return total


@gluon.jit
def _places(x, packed, M, K, ROWS: gl.constexpr, WARPS: gl.constexpr, BLOCKS: gl.constexpr, MMA: gl.constexpr):
    """Where a lane begins: pointers to words, to words of four scales, and to pairs of elements of x, as ``_turn``
    reads them, less what is added for block, k6, k4 k3 and r3: the same for all lanes, it becomes part of instructions.
    """
    tile = gl.program_id(0) // 2  # of 16 rows: r6, r5, r4
    r2 = gl.program_id(0) % 2
    rows = packed + tile // 8 * ((K + 127) // 128) * _BLOCK  # 128 of them

    WORD: gl.constexpr = _any_words(WARPS, BLOCKS, MMA).type.layout
    pair = places_along(8, 1, 6, WORD)
    words = places_along(WARPS, 0, 6, WORD) * (BLOCKS * _BLOCK) + tile % 8 // 4 * 1024 + tile % 4 * 128 + r2 * 64
    words += pair // 4 * 512 + pair % 4 * 16 + places_along(4, 5, 6, WORD) * 4

    BOTH: gl.constexpr = _any_scales(WARPS, BLOCKS, MMA).type.layout
    scales = places_along(WARPS, 0, 4, BOTH) * (BLOCKS * _BLOCK) + 4096 + tile % 8 * 16 + r2 * 8
    scales += places_along(8, 1, 4, BOTH) % 4 * 2

    X: gl.constexpr = _any_pairs(ROWS, WARPS, BLOCKS, MMA).type.layout
    column = places_along(2 * ROWS, 1, 6, X)
    m = gl.minimum(column // 8 * 4 + column % 4, M - 1)
    pairs = (
        m * (K // 32 * 16)
        + places_along(WARPS, 0, 6, X) * (BLOCKS * 64)
        + column % 8 // 4 * 16
        + places_along(4, 5, 6, X)
    )
    return rows + words, rows + scales, x + pairs


@gluon.jit
def _turn(
    words,
    scales,
    pairs,
    first,  # block of K of the first warp
    K,
    total,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    RAGGED: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Adds the products of BLOCKS blocks of each warp to its total. RAGGED: K may end before.

    It reads words ``[warp, pair, block, k6, k4 k3, k21]``, words of scales ``[warp, pair, block, r3]`` and pairs of x
    ``[warp, column, block, k6, k4 k3, k21]``. A pair of rows is k5, r1, r0; a column the higher bits of m, k5, and m's
    lower two.
    """
    WORD: gl.constexpr = _any_words(WARPS, BLOCKS, MMA).type.layout
    BOTH: gl.constexpr = _any_scales(WARPS, BLOCKS, MMA).type.layout
    X: gl.constexpr = _any_pairs(ROWS, WARPS, BLOCKS, MMA).type.layout
    words += first * _BLOCK
    words += (
        places_along(BLOCKS, 2, 6, WORD) * _BLOCK + places_along(2, 3, 6, WORD) * 2048 + places_along(4, 4, 6, WORD)
    )
    scales += first * _BLOCK
    scales += places_along(BLOCKS, 2, 4, BOTH) * _BLOCK + places_along(2, 3, 4, BOTH)
    pairs += first * 64
    pairs += places_along(BLOCKS, 2, 6, X) * 64 + places_along(2, 3, 6, X) * 32 + places_along(4, 4, 6, X) * 4
    if RAGGED:
        left = K // 32 - first * 4  # groups
        group = (places_along(WARPS, 0, 6, WORD) * BLOCKS + places_along(BLOCKS, 2, 6, WORD)) * 4
        group += places_along(2, 3, 6, WORD) * 2 + places_along(8, 1, 6, WORD) // 4
        word = gl.load(words, mask=group < left, other=0, eviction_policy="evict_first")
        group = (places_along(WARPS, 0, 4, BOTH) * BLOCKS + places_along(BLOCKS, 2, 4, BOTH)) * 4
        codes = gl.load(scales, mask=group < left, other=0)
        group = (places_along(WARPS, 0, 6, X) * BLOCKS + places_along(BLOCKS, 2, 6, X)) * 4
        group += places_along(2, 3, 6, X) * 2 + places_along(2 * ROWS, 1, 6, X) % 8 // 4
        pair = gl.load(pairs, mask=group < left, other=0)
    else:
        word = gl.load(words, eviction_policy="evict_first")
        codes = gl.load(scales)
        pair = gl.load(pairs)
    return mma_v2(
        _weight(word, codes, WARPS, BLOCKS, MMA, DTYPE, EXACT), _rows(pair, ROWS, WARPS, BLOCKS, MMA, DTYPE), total
    )


@gluon.jit
def _rows(pair, ROWS: gl.constexpr, WARPS: gl.constexpr, BLOCKS: gl.constexpr, MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Operand B ``[WARPS, BLOCKS * 64, 2 * ROWS]``: names registers, moves nothing."""
    one, other = halves(pair)
    rows = gl.permute(gl.reshape(gl.join(one, other), [WARPS, 2 * ROWS, BLOCKS * 64]), (0, 2, 1))
    return gl.convert_layout(rows.to(DTYPE, bitcast=True), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def _weight(
    word,
    codes,
    WARPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Operand A ``[WARPS, 16, BLOCKS * 64]``."""
    codes_one, codes_other = gl.split(codes)
    one, other = separate(word, DTYPE, EXACT)
    one = scaled(one, _scale(codes_one, word, WARPS, BLOCKS, DTYPE, EXACT), DTYPE, EXACT)
    other = scaled(other, _scale(codes_other, word, WARPS, BLOCKS, DTYPE, EXACT), DTYPE, EXACT)
    return operand(one, other, [WARPS, 16, BLOCKS * 64], gl.DotOperandLayout(0, MMA, 2), DTYPE)


@gluon.jit
def _scale(codes, word, WARPS: gl.constexpr, BLOCKS: gl.constexpr, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """What the elements of each word are multiplied by, in the form that ``scaled`` takes, from words ``[warp, pair,
    block]`` of the codes of four groups. A lane takes those of its k5.
    """
    GROUP: gl.constexpr = gl.SliceLayout(4, gl.SliceLayout(5, word.type.layout))
    group = places_along(2, 3, 4, GROUP) * 2 + places_along(8, 1, 4, GROUP) // 4
    every = gl.full([WARPS, 8, BLOCKS, 2], 0, gl.int32, GROUP)
    codes, _ = gl.broadcast(gl.expand_dims(codes, 3), every)
    if EXACT:
        scale = scale_to_float32((codes >> (group * 8)) & 0xFF)
    elif gl.bfloat16 == DTYPE:  # 2**120 times the scale, in both halves: bits without a carry, as no code is above 134
        code = gl.inline_asm_elementwise(
            _EXTRACT, "=r,r,r", [codes, every + group * 0x0101 + 0x4040], gl.int32, True, 1
        )
        scale = code * 0x80 + 0x3C003C00
    else:  # 2**8 times the scale
        code = gl.inline_asm_elementwise(_EXTRACT, "=r,r,r", [codes, every + group + 0x4440], gl.int32, True, 1)
        scale = float16_in_both_halves(code * 0x00800000 + 0x04000000)
    scale, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(scale, 4), 5), word)
    return scale


@gluon.jit
def _sums(total, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """``[r3, r1 r0, m]``, from ``total [WARPS, 16, 2 * ROWS]``: where both groups are the same, of all warps."""
    LAYOUT: gl.constexpr = total.type.layout
    same = places_along(16, 1, 3, LAYOUT) % 8 // 4 == places_along(2 * ROWS, 2, 3, LAYOUT) % 8 // 4
    total = gl.reshape(gl.where(same, total, 0.0), [WARPS, 2, 2, 4, ROWS // 4, 2, 4])
    # One axis after another: a sum takes the lanes of its axis to be neighbours, which those of two axes are not.
    return gl.reshape(gl.sum(gl.sum(gl.sum(total, 5), 2), 0), [2, 4, ROWS])


@gluon.jit
def _any_words(WARPS: gl.constexpr, BLOCKS: gl.constexpr, MMA: gl.constexpr):
    """Some words in the layout that makes decoded elements lie as operand A wants them."""
    tile = gl.full([WARPS, 16, BLOCKS * 64], 0, gl.int8, gl.DotOperandLayout(0, MMA, 2))
    bits = gl.reshape(tile, [WARPS, 2, 8, BLOCKS, 2, 4, 4, 2])  # warp, r3, pair, block, k6, k43, k21, k0
    rows, _ = gl.split(gl.permute(bits, (0, 2, 3, 4, 5, 6, 1, 7)))
    word, _ = gl.split(rows)
    return word


@gluon.jit
def _any_scales(WARPS: gl.constexpr, BLOCKS: gl.constexpr, MMA: gl.constexpr):
    """Some words of scales in the layout in which a lane has those of its words, both r3 side by side."""
    WORD: gl.constexpr = _any_words(WARPS, BLOCKS, MMA).type.layout
    four = gl.full([WARPS, 8, BLOCKS], 0, gl.int32, gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, WORD))))
    return gl.join(four, four)


@gluon.jit
def _any_pairs(ROWS: gl.constexpr, WARPS: gl.constexpr, BLOCKS: gl.constexpr, MMA: gl.constexpr):
    """Some pairs of elements of x in the layout that makes them lie as operand B wants them."""
    tile = gl.full([WARPS, BLOCKS * 64, 2 * ROWS], 0, gl.int8, gl.DotOperandLayout(1, MMA, 2))
    pair, _ = gl.split(gl.reshape(gl.permute(tile, (0, 2, 1)), [WARPS, 2 * ROWS, BLOCKS, 2, 4, 4, 2]))
    return pair


@gluon.jit
def places_along(size: gl.constexpr, dim: gl.constexpr, rank: gl.constexpr, LAYOUT: gl.constexpr):
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
