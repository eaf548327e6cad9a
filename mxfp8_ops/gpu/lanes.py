"""What a lane does in the kernels of ``direct`` and ``row``: what it reads, how that becomes operands of a matrix
instruction, and how the sums of a program's warps are added up.

SIZES are rows of x (4 or 8), tiles of 8 outputs (1 or 2) and warps of a program, and blocks of K that a warp takes in a
turn.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fragments import fast_scales, halves, scale_to_float32, scaled, separate
from .places import places_along

BLOCK = gl.constexpr(132 * 32)  # words of 128 rows and 128 elements of K: see mxfp8_ops.packing
_EXTRACT = gl.constexpr("prmt.b32 $0, $1, 0, $2;")  # bytes of $1 by number; number 4 is zero


@gluon.jit
def first_places(x, packed, M, K, SIZES: gl.constexpr, MMA: gl.constexpr):
    """Where a lane begins: pointers to words, to words of four scales, and to pairs of elements of x, less what is
    added for tile, block, k6, k4 k3 and r3: the same for all lanes, it becomes part of instructions.
    """
    ROWS: gl.constexpr = SIZES[0]
    WARPS: gl.constexpr = SIZES[2]
    BLOCKS: gl.constexpr = SIZES[3]
    tile = gl.program_id(0) * SIZES[1]  # the first, of 8 rows: r6, r5, r4, r2
    # Shifts: a division of numbers that may be negative, for all the compiler knows, takes longer.
    rows = packed + (tile >> 4) * ((K + 127) >> 7) * BLOCK  # 128 of them

    WORD: gl.constexpr = any_words(SIZES, MMA).type.layout
    pair = places_along(8, 2, 7, WORD)
    words = places_along(WARPS, 0, 7, WORD) * (BLOCKS * BLOCK) + (tile >> 3 & 1) * 1024 + (tile & 7) * 64
    words += pair // 4 * 512 + pair % 4 * 16 + places_along(4, 6, 7, WORD) * 4

    BOTH: gl.constexpr = any_scales(SIZES, MMA).type.layout
    scales = places_along(WARPS, 0, 5, BOTH) * (BLOCKS * BLOCK) + 4096 + (tile & 15) * 8
    scales += places_along(8, 2, 5, BOTH) % 4 * 2

    X: gl.constexpr = any_pairs(SIZES, MMA).type.layout
    column = places_along(2 * ROWS, 1, 6, X)
    m = gl.minimum(column // 8 * 4 + column % 4, M - 1)
    pairs = m * (K >> 1) + places_along(WARPS, 0, 6, X) * (BLOCKS * 64)
    pairs += column % 8 // 4 * 16 + places_along(4, 5, 6, X)
    return rows + words, rows + scales, x + pairs


@gluon.jit
def all_places(words, scales, SIZES: gl.constexpr, MMA: gl.constexpr):
    """Pointers to all that a lane reads in a turn, from where it begins: words ``[warp, tile, pair, block, k6, k4 k3,
    k21]`` and words of scales ``[warp, tile, pair, block, r3]``. A pair of rows is k5, r1, r0.
    """
    WORD: gl.constexpr = any_words(SIZES, MMA).type.layout
    BOTH: gl.constexpr = any_scales(SIZES, MMA).type.layout
    words += places_along(SIZES[1], 1, 7, WORD) * 64 + places_along(SIZES[3], 3, 7, WORD) * BLOCK
    words += places_along(2, 4, 7, WORD) * 2048 + places_along(4, 5, 7, WORD)
    scales += places_along(SIZES[1], 1, 5, BOTH) * 8 + places_along(SIZES[3], 3, 5, BOTH) * BLOCK
    scales += places_along(2, 4, 5, BOTH)
    return words, scales


@gluon.jit
def rows_operand(pair, SIZES: gl.constexpr, MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Operand B ``[WARPS, BLOCKS * 64, 2 * ROWS]``: names registers, moves nothing."""
    one, other = halves(pair)
    rows = gl.permute(gl.reshape(gl.join(one, other), [SIZES[2], 2 * SIZES[0], SIZES[3] * 64]), (0, 2, 1))
    return gl.convert_layout(rows.to(DTYPE, bitcast=True), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def weight_operand(
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
    one, other = separate(word, 4, DTYPE, FOR_FLOAT16, EXACT)
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
def store(total, bias, out, M, N, SIZES: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Stores the sum of all warps' ``total [WARPS, TILES * 16, 2 * ROWS]`` and of the bias."""
    TILES: gl.constexpr = SIZES[1]
    total = _sums(total, SIZES[0], TILES, SIZES[2])
    LAYOUT: gl.constexpr = total.type.layout
    tile = gl.program_id(0) * TILES + places_along(TILES, 0, 4, LAYOUT)
    n = tile // 2 * 16 + tile % 2 * 4 + places_along(2, 1, 4, LAYOUT) * 8 + places_along(4, 2, 4, LAYOUT)
    m = places_along(SIZES[0], 3, 4, LAYOUT)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n < N, other=0).to(gl.float32)
    gl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=(m < M) & (n < N))


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
def any_words(SIZES: gl.constexpr, MMA: gl.constexpr):
    """Some words in the layout that makes decoded elements lie as operand A wants them."""
    tile = gl.full([SIZES[2], SIZES[1] * 16, SIZES[3] * 64], 0, gl.int8, gl.DotOperandLayout(0, MMA, 2))
    # warp, tile, r3, pair, block, k6, k43, k21, k0
    bits = gl.reshape(tile, [SIZES[2], SIZES[1], 2, 8, SIZES[3], 2, 4, 4, 2])
    rows, _ = gl.split(gl.permute(bits, (0, 1, 3, 4, 5, 6, 7, 2, 8)))
    word, _ = gl.split(rows)
    return word


@gluon.jit
def any_scales(SIZES: gl.constexpr, MMA: gl.constexpr):
    """Some words of scales in the layout in which a lane has those of its words, both r3 side by side."""
    WORD: gl.constexpr = any_words(SIZES, MMA).type.layout
    FOUR: gl.constexpr = gl.SliceLayout(4, gl.SliceLayout(5, gl.SliceLayout(6, WORD)))
    four = gl.full([SIZES[2], SIZES[1], 8, SIZES[3]], 0, gl.int32, FOUR)
    return gl.join(four, four)


@gluon.jit
def any_pairs(SIZES: gl.constexpr, MMA: gl.constexpr):
    """Some pairs of elements of x in the layout that makes them lie as operand B wants them."""
    tile = gl.full([SIZES[2], SIZES[3] * 64, 2 * SIZES[0]], 0, gl.int8, gl.DotOperandLayout(1, MMA, 2))
    pair, _ = gl.split(gl.reshape(gl.permute(tile, (0, 2, 1)), [SIZES[2], 2 * SIZES[0], SIZES[3], 2, 4, 4, 2]))
    return pair
