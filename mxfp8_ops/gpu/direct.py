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

from .fragments import fast_scales, halves, place_of_mark, scale_to_float32, scaled, separate
from .places import places_along
from .tiles import wait_for_kernel_before

_BLOCK = gl.constexpr(132 * 32)  # words of 128 rows and 128 elements of K: see mxfp8_ops.packing
_EXTRACT = gl.constexpr("prmt.b32 $0, $1, 0, $2;")  # bytes of $1 by number; number 4 is zero


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
    total, marked = _products(x, packed, mark, M, K, SIZES, MMA, DTYPE, FOR_FLOAT16, RAGGED_K, False)
    if marked != 0:
        total, _ = _products(x, packed, mark, M, K, SIZES, MMA, DTYPE, FOR_FLOAT16, True, True)
    total = _sums(total, ROWS, TILES, WARPS)
    LAYOUT: gl.constexpr = total.type.layout
    tile = gl.program_id(0) * TILES + places_along(TILES, 0, 4, LAYOUT)
    n = tile // 2 * 16 + tile % 2 * 4 + places_along(2, 1, 4, LAYOUT) * 8 + places_along(4, 2, 4, LAYOUT)
    m = places_along(ROWS, 3, 4, LAYOUT)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n < N, other=0).to(gl.float32)
    gl.store(out + m * N + n, total.to(DTYPE), mask=(m < M) & (n < N))


@gluon.jit
def _products(
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
        words, scales, pairs = _places(x, packed, M, K, SIZES, MMA)
        for _ in range(K // (TOGETHER * 128)):
            total, marked = _turn(words, scales, pairs, mark, 0, total, SIZES, MMA, DTYPE, FOR_FLOAT16, False, False)
            words += TOGETHER * _BLOCK
            scales += TOGETHER * _BLOCK
            pairs += TOGETHER * 64
        done = K // (TOGETHER * 128) * TOGETHER
    if RAGGED:  # a block of each warp in a turn, so that all have something to do as long as possible
        REST: gl.constexpr = (ROWS, TILES, SIZES[2], 1)
        words, scales, pairs = _places(x + done * 64, packed + done * _BLOCK, M, K, REST, MMA)
        for left in range(K // 32 - done * 4, 0, -4 * SIZES[2]):
            total, marked = _turn(words, scales, pairs, mark, left, total, REST, MMA, DTYPE, FOR_FLOAT16, True, EXACT)
            words += SIZES[2] * _BLOCK
            scales += SIZES[2] * _BLOCK
            pairs += SIZES[2] * 64
    return total, marked


@gluon.jit
def _places(x, packed, M, K, SIZES: gl.constexpr, MMA: gl.constexpr):
    """Where a lane begins: pointers to words, to words of four scales, and to pairs of elements of x, as ``_turn``
    reads them, less what is added for tile, block, k6, k4 k3 and r3: the same for all lanes, it becomes part of
    instructions.
    """
    ROWS: gl.constexpr = SIZES[0]
    WARPS: gl.constexpr = SIZES[2]
    BLOCKS: gl.constexpr = SIZES[3]
    tile = gl.program_id(0) * SIZES[1]  # the first, of 8 rows: r6, r5, r4, r2
    # Shifts: a division of numbers that may be negative, for all the compiler knows, takes longer.
    rows = packed + (tile >> 4) * ((K + 127) >> 7) * _BLOCK  # 128 of them

    WORD: gl.constexpr = _any_words(SIZES, MMA).type.layout
    pair = places_along(8, 2, 7, WORD)
    words = places_along(WARPS, 0, 7, WORD) * (BLOCKS * _BLOCK) + (tile >> 3 & 1) * 1024 + (tile & 7) * 64
    words += pair // 4 * 512 + pair % 4 * 16 + places_along(4, 6, 7, WORD) * 4

    BOTH: gl.constexpr = _any_scales(SIZES, MMA).type.layout
    scales = places_along(WARPS, 0, 5, BOTH) * (BLOCKS * _BLOCK) + 4096 + (tile & 15) * 8
    scales += places_along(8, 2, 5, BOTH) % 4 * 2

    X: gl.constexpr = _any_pairs(SIZES, MMA).type.layout
    column = places_along(2 * ROWS, 1, 6, X)
    m = gl.minimum(column // 8 * 4 + column % 4, M - 1)
    pairs = m * (K >> 1) + places_along(WARPS, 0, 6, X) * (BLOCKS * 64)
    pairs += column % 8 // 4 * 16 + places_along(4, 5, 6, X)
    return rows + words, rows + scales, x + pairs


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
    TILES: gl.constexpr = SIZES[1]
    WARPS: gl.constexpr = SIZES[2]
    BLOCKS: gl.constexpr = SIZES[3]
    WORD: gl.constexpr = _any_words(SIZES, MMA).type.layout
    BOTH: gl.constexpr = _any_scales(SIZES, MMA).type.layout
    X: gl.constexpr = _any_pairs(SIZES, MMA).type.layout
    words += places_along(TILES, 1, 7, WORD) * 64 + places_along(BLOCKS, 3, 7, WORD) * _BLOCK
    words += places_along(2, 4, 7, WORD) * 2048 + places_along(4, 5, 7, WORD)
    scales += places_along(TILES, 1, 5, BOTH) * 8 + places_along(BLOCKS, 3, 5, BOTH) * _BLOCK
    scales += places_along(2, 4, 5, BOTH)
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
    weight = _weight(word, codes, SIZES, MMA, DTYPE, FOR_FLOAT16, EXACT)
    return mma_v2(weight, _rows(pair, SIZES, MMA, DTYPE), total), marked


@gluon.jit
def _rows(pair, SIZES: gl.constexpr, MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Operand B ``[WARPS, BLOCKS * 64, 2 * ROWS]``: names registers, moves nothing."""
    one, other = halves(pair)
    rows = gl.permute(gl.reshape(gl.join(one, other), [SIZES[2], 2 * SIZES[0], SIZES[3] * 64]), (0, 2, 1))
    return gl.convert_layout(rows.to(DTYPE, bitcast=True), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def _weight(
    word,
    codes,
    SIZES: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    FOR_FLOAT16: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Operand A ``[WARPS, TILES * 16, BLOCKS * 64]``: names registers but for the arithmetic."""
    codes_one, codes_other = gl.split(codes)
    one, other = separate(word, DTYPE, FOR_FLOAT16, EXACT)
    one = scaled(one, _scale(codes_one, word, SIZES, DTYPE, EXACT), DTYPE, EXACT)
    other = scaled(other, _scale(codes_other, word, SIZES, DTYPE, EXACT), DTYPE, EXACT)
    one_0, one_1 = halves(one)
    other_0, other_1 = halves(other)
    bits = gl.join(gl.join(one_0, other_0), gl.join(one_1, other_1))  # warp, tile, pair, block, k6, k43, k21, r3, k0
    tile = gl.reshape(gl.permute(bits, (0, 1, 7, 2, 3, 4, 5, 6, 8)), [SIZES[2], SIZES[1] * 16, SIZES[3] * 64])
    return gl.convert_layout(tile.to(DTYPE, bitcast=True), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _scale(codes, word, SIZES: gl.constexpr, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """What the elements of each word are multiplied by, in the form that ``scaled`` takes, from words ``[warp, tile,
    pair, block]`` of the codes of four groups. A lane takes those of its k5.
    """
    GROUP: gl.constexpr = gl.SliceLayout(5, gl.SliceLayout(6, word.type.layout))
    CODES: gl.constexpr = codes.type.layout
    k5 = places_along(8, 2, 4, CODES) // 4
    if EXACT:
        zero, one = scale_to_float32((codes >> (k5 * 8)) & 0xFF), scale_to_float32((codes >> (k5 * 8 + 16)) & 0xFF)
    else:
        # Of the codes of both k6, where `fast_scales` wants them.
        numbers = k5 * 0x0101 + 0x4240 if gl.bfloat16 == DTYPE else k5 * 0x1001 + 0x2440
        both = gl.inline_asm_elementwise(_EXTRACT, "=r,r,r", [codes, numbers], gl.int32, True, 1)
        zero, one = fast_scales(both, DTYPE)
    scale = gl.convert_layout(gl.join(zero, one), GROUP, assert_trivial=True)
    scale, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(scale, 5), 6), word)
    return scale


@gluon.jit
def _sums(total, ROWS: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr):
    """``[tile, r3, r1 r0, m]``, from ``total [WARPS, TILES * 16, 2 * ROWS]``: where both groups are the same, of all
    warps. Every lane of the program adds up a share, and what it has is what it stores.
    """
    shared = gl.allocate_shared_memory(gl.float32, total.shape, _sums_in_memory(ROWS, TILES, WARPS))
    shared.store(total)
    PARTS: gl.constexpr = _sums_in_lanes(ROWS, TILES, WARPS)
    parts = gl.reshape(shared.load(PARTS), [WARPS, TILES, 2, 2, 4, ROWS // 4, 2, 4])
    LAYOUT: gl.constexpr = parts.type.layout
    parts = gl.where(places_along(2, 3, 8, LAYOUT) == places_along(2, 6, 8, LAYOUT), parts, 0.0)
    return gl.reshape(gl.sum(gl.sum(gl.sum(parts, 6), 3), 0), [TILES, 2, 4, ROWS])


@gluon.constexpr_function
def _sums_places(rows, tiles, warps):
    """Places in ``[warps, tiles * 16, 2 * rows]`` of the bits of a warp's number, and of those of a sum's: m's lower
    two, r1, r0, r3, then tile and m's highest.
    """
    warp = [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    more = [[0, 16 << i, 0] for i in range(tiles.bit_length() - 1)] + [[0, 0, 8]] * (rows // 8)
    return warp, [[0, 0, 1], [0, 0, 2], [0, 2, 0], [0, 1, 0], [0, 8, 0], *more]


@gluon.constexpr_function
def _sums_in_lanes(rows, tiles, warps):
    """Parts of the same sum in lanes next to each other, both groups in one lane."""
    warp, places = _sums_places(rows, tiles, warps)
    lanes = 5 - len(warp)
    registers = [[0, 4, 0], [0, 0, 4], *places[5:]]
    return gl.DistributedLinearLayout(
        registers, warp + places[:lanes], places[lanes:5], [], [warps, tiles * 16, 2 * rows]
    )


@gluon.constexpr_function
def _sums_in_memory(rows, tiles, warps):
    """A warp's sums one after another, as matrix units leave them in lanes. Those of the next warp stand in other
    banks: bits of the warp's number are added to those that choose the bank and are the same for all who read at once.
    """
    warp, places = _sums_places(rows, tiles, warps)
    m0, m1, r1, r0, r3 = places[:5]
    swizzled = [
        [a + b for a, b in zip(place, other, strict=True)]
        for place, other in zip(warp, ([0, 0, 4], r0, r1, m1), strict=False)
    ]
    return gl.SharedLinearLayout([m0, m1, [0, 0, 4], r0, r1, [0, 4, 0], r3, *places[5:], *swizzled])


@gluon.jit
def _any_words(SIZES: gl.constexpr, MMA: gl.constexpr):
    """Some words in the layout that makes decoded elements lie as operand A wants them."""
    tile = gl.full([SIZES[2], SIZES[1] * 16, SIZES[3] * 64], 0, gl.int8, gl.DotOperandLayout(0, MMA, 2))
    # warp, tile, r3, pair, block, k6, k43, k21, k0
    bits = gl.reshape(tile, [SIZES[2], SIZES[1], 2, 8, SIZES[3], 2, 4, 4, 2])
    rows, _ = gl.split(gl.permute(bits, (0, 1, 3, 4, 5, 6, 7, 2, 8)))
    word, _ = gl.split(rows)
    return word


@gluon.jit
def _any_scales(SIZES: gl.constexpr, MMA: gl.constexpr):
    """Some words of scales in the layout in which a lane has those of its words, both r3 side by side."""
    WORD: gl.constexpr = _any_words(SIZES, MMA).type.layout
    FOUR: gl.constexpr = gl.SliceLayout(4, gl.SliceLayout(5, gl.SliceLayout(6, WORD)))
    four = gl.full([SIZES[2], SIZES[1], 8, SIZES[3]], 0, gl.int32, FOUR)
    return gl.join(four, four)


@gluon.jit
def _any_pairs(SIZES: gl.constexpr, MMA: gl.constexpr):
    """Some pairs of elements of x in the layout that makes them lie as operand B wants them."""
    tile = gl.full([SIZES[2], SIZES[3] * 64, 2 * SIZES[0]], 0, gl.int8, gl.DotOperandLayout(1, MMA, 2))
    pair, _ = gl.split(gl.reshape(gl.permute(tile, (0, 2, 1)), [SIZES[2], 2 * SIZES[0], SIZES[3], 2, 4, 4, 2]))
    return pair
