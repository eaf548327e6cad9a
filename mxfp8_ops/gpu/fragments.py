"""From the words of a packed weight in shared memory to registers, as Hopper's matrix instruction takes its operand A.

A tile is 64 or 128 rows of the weight by 64 elements of K (see ``mxfp8_ops.packing`` for the order of its words). The
layouts make every step but the arithmetic free: a lane reads its words 16 bytes at a time without bank conflicts, and
what it has decoded is already what the instruction wants from this lane, in this register.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .versions import reinterpret

# Words of a tile as a tensor [r654, r210, k5, k4, k3, k21], scales as [r654, r210, r3]: where each bit is, in order.
_WORD_PLACE = ("k3", "k4", "k1", "k2", "r0", "r1", "r2", "r4", "r5", "k5", "r6")
_SCALE_PLACE = ("r3", "r0", "r1", "r2", "r4", "r5", "r6")


@gluon.constexpr_function
def words_layout(rows):
    """Where TMA has put the words of a tile: in their order, but 16-byte chunks swizzled within each 1024 bytes."""
    axis = {"r4": (0, 1), "r5": (0, 2), "r6": (0, 4), "r0": (1, 1), "r1": (1, 2), "r2": (1, 4)}
    axis |= {"k5": (2, 1), "k4": (3, 1), "k3": (4, 1), "k1": (5, 1), "k2": (5, 2)}
    bases = [[axis[bit][1] if axis[bit][0] == i else 0 for i in range(6)] for bit in _WORD_PLACE]
    swizzled = [list(basis) for basis in bases]
    for row_bit, chunk_bit in ((5, 2), (6, 3), (7, 4)):  # a chunk's number is xored with its row's number modulo 8
        swizzled[row_bit] = [a + b for a, b in zip(bases[row_bit], bases[chunk_bit], strict=True)]
    return gl.SharedLinearLayout(swizzled[: 10 + rows // 128], [], 1024)


@gluon.constexpr_function
def scales_layout(rows):
    """Where the scales of a tile are."""
    axis = {"r3": (2, 1), "r0": (1, 1), "r1": (1, 2), "r2": (1, 4), "r4": (0, 1), "r5": (0, 2), "r6": (0, 4)}
    bases = [[axis[bit][1] if axis[bit][0] == i else 0 for i in range(3)] for bit in _SCALE_PLACE]
    return gl.SharedLinearLayout(bases[: 6 + rows // 128], [], 128)


# Masks for both halves of a word, as the int32 that Triton takes.
_IN_PLACE = gl.constexpr(0x87F087F0 - 2**32)
_SIGNS = gl.constexpr(0x80008000 - 2**32)
_FLOAT16_IN_PLACE = gl.constexpr(0xBF80BF80 - 2**32)
_FLOAT16_MAGNITUDES = gl.constexpr(0x3F803F80)
_BFLOAT16_MAGNITUDES = gl.constexpr(0x07F007F0)
_UPPER = gl.constexpr(0xFFFF0000 - 2**32)

# In each half the upper byte of the first word below the lower byte of the second.
_BYTES_OF_BOTH = gl.constexpr("prmt.b32 $0, $1, $2, 0x6341;")
_DOWN_BY_4 = gl.constexpr("shf.l.wrap.b32 $0, $1, $1, 28;")  # around the end, as the next
_UP_BY_1 = gl.constexpr("shf.l.wrap.b32 $0, $1, $1, 1;")
_MULTIPLY_BFLOAT16 = gl.constexpr("mul.rn.bf16x2 $0, $1, $2;")
_MULTIPLY_FLOAT16 = gl.constexpr("mul.rn.f16x2 $0, $1, $2;")
_ROUND_BFLOAT16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
_ROUND_FLOAT16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
_SPLIT = gl.constexpr("mov.b32 {$0, $1}, $2;")
_LOWER_TWICE = gl.constexpr("{\n.reg .b16 one, other;\nmov.b32 {one, other}, $1;\nmov.b32 $0, {one, one};\n}")
_UPPER_TWICE = gl.constexpr("{\n.reg .b16 one, other;\nmov.b32 {one, other}, $1;\nmov.b32 $0, {other, other};\n}")


@gluon.jit
def needs_exact(packed, N, K, DTYPE: gl.constexpr):
    """Whether the packed weight ``[N, K]`` has codes that need exact decoding in DTYPE."""
    return gl.load(place_of_mark(packed, N, K, DTYPE)) != 0


@gluon.jit
def place_of_mark(packed, N, K, DTYPE: gl.constexpr):
    """Where it is written whether that is so: a word of the weight's last row, 0 if not."""
    blocks = (N + 127 >> 7) * (K + 127 >> 7)
    WORD: gl.constexpr = 0 if gl.bfloat16 == DTYPE else 1
    return packed + (blocks * (132 * 32) + WORD)


@gluon.jit
def weight_fragment(
    words,
    scales,
    HALF: gl.constexpr,
    ROWS: gl.constexpr,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    FOR_FLOAT16: gl.constexpr,  # the weight was packed for x of float16
    EXACT: gl.constexpr,
):
    """Operand A ``[ROWS, 64]`` in DTYPE: the half (0 or 1) of a block's elements whose ``words`` these are, times the
    block's ``scales``. Both in shared memory.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WORD: gl.constexpr = _any_words(ROWS, OPERAND).type.layout
    word = reinterpret(words, gl.int32, [ROWS // 16, 8, 2, 2, 2, 4], words_layout(ROWS)).load(WORD)
    one, other = _scale_words(scales, ROWS, WORD)
    scale_one = _scale_operand(one, HALF, word, WORD, DTYPE, EXACT)
    scale_other = _scale_operand(other, HALF, word, WORD, DTYPE, EXACT)
    pair_one, pair_other = separate(word, 4, DTYPE, FOR_FLOAT16, EXACT)
    pair_one = scaled(pair_one, scale_one, DTYPE, EXACT)
    pair_other = scaled(pair_other, scale_other, DTYPE, EXACT)
    return operand(pair_one, pair_other, [ROWS, 64], OPERAND, DTYPE)


@gluon.jit
def _any_words(ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Some words in the layout that makes decoded elements lie as OPERAND wants them."""
    tile = gl.full([ROWS, 64], 0, gl.int8, OPERAND)
    bits = gl.reshape(tile, [ROWS // 16, 2, 8, 2, 2, 2, 4, 2])  # r654, r3, r210, k5, k4, k3, k21, k0
    rows, _ = gl.split(gl.permute(bits, (0, 2, 3, 4, 5, 6, 1, 7)))
    word, _ = gl.split(rows)
    return word


@gluon.jit
def _scale_words(scales, ROWS: gl.constexpr, WORD: gl.constexpr):
    """The words of scales ``[r654, r210]`` of the rows r and r + 8 that a lane's words hold."""
    ROW: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, WORD))))
    row = gl.full([ROWS // 16, 8], 0, gl.int32, ROW)
    BOTH: gl.constexpr = gl.join(row, row).type.layout
    return gl.split(reinterpret(scales, gl.int32, [ROWS // 16, 8, 2], scales_layout(ROWS)).load(BOTH))


@gluon.jit
def _scale_operand(scales, HALF: gl.constexpr, word, WORD: gl.constexpr, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """What the elements of each word are multiplied by: the scale of its group of 32."""
    GROUP: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, WORD)))
    first, second = two_scales(scales, 2 * HALF, 2 * HALF + 1, DTYPE, EXACT)
    groups = gl.convert_layout(gl.join(first, second), GROUP, assert_trivial=True)
    groups = gl.expand_dims(gl.expand_dims(gl.expand_dims(groups, 3), 4), 5)
    groups, _ = gl.broadcast(groups, word)
    return groups


@gluon.jit
def two_scales(scales, FIRST: gl.constexpr, SECOND: gl.constexpr, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """Two of the four scales in a word, in the form that ``scaled`` takes."""
    if EXACT:
        first, second = (scales >> (8 * FIRST)) & 0xFF, (scales >> (8 * SECOND)) & 0xFF
        return scale_to_float32(first), scale_to_float32(second)
    else:
        return fast_scales(two_bytes(scales, FIRST, SECOND, 2 if gl.bfloat16 == DTYPE else 3), DTYPE)


@gluon.jit
def fast_scales(codes, DTYPE: gl.constexpr):
    """2**120 (bfloat16) or 2**8 (float16) times the scales of two codes, the halves of a word, or for float16 its first
    and last byte; each in both halves of a word. But only one word is made of the two: instructions that multiply can
    take either half of it twice.
    """
    if gl.bfloat16 == DTYPE:  # bits without a carry, as no code is above 134
        both = codes * 0x80 + 0x3C003C00
    else:
        one = (codes << 23) + 0x04000000  # the last byte has gone over the top
        other = ((codes >> 1) & 0x7FFFFFFF) + 0x04000000  # and the first one is less than what is rounded off
        one, other = one.to(gl.float32, bitcast=True), other.to(gl.float32, bitcast=True)
        both = gl.inline_asm_elementwise(_ROUND_FLOAT16, "=r,f,f", [one, other], gl.int32, True, 1)
    return each_twice(both)


@gluon.jit
def each_twice(word):
    """The lower half of words in both halves, and the upper half."""
    lower = gl.inline_asm_elementwise(_LOWER_TWICE, "=r,r", [word], gl.int32, True, 1)
    upper = gl.inline_asm_elementwise(_UPPER_TWICE, "=r,r", [word], gl.int32, True, 1)
    return lower, upper


@gluon.jit
def two_bytes(word, FIRST: gl.constexpr, SECOND: gl.constexpr, PLACE: gl.constexpr):
    """Words of two bytes of others by their numbers: the one is the lowest byte, the other lies at PLACE (2: each in a
    half of its own). The rest is zero.
    """
    return gl.inline_asm_elementwise(_two_bytes(FIRST, SECOND, PLACE), "=r,r", [word], gl.int32, True, 1)


@gluon.constexpr_function
def _two_bytes(first, second, place):
    zero = 4
    numbers = [first, zero, zero, zero]
    numbers[place] = second
    return f"prmt.b32 $0, $1, 0, {sum(number << 4 * i for i, number in enumerate(numbers))};"


@gluon.jit
def scale_to_float32(code):
    """``2**(code - 127)`` by its bits, of an int32: 0 is the subnormal 2**-127, 255 NaN."""
    bits = gl.where(code == 255, 0x7FC00000, gl.where(code == 0, 0x00400000, code << 23))
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def float16_in_both_halves(bits):
    """A float32, by its bits, as a float16 in both halves of a word."""
    value = bits.to(gl.float32, bitcast=True)
    return gl.inline_asm_elementwise(_ROUND_FLOAT16, "=r,f,f", [value, value], gl.int32, True, 1)


@gluon.jit
def separate(word, APART: gl.constexpr, DTYPE: gl.constexpr, FOR_FLOAT16: gl.constexpr, EXACT: gl.constexpr):
    """The elements of row r and of row r + 8, each two in a word: bfloat16 of 2**-120 times their values if EXACT or
    if that is DTYPE, else float16 of 2**-8 times their values. Neighbours along k3 are APART in the order of words.

    See ``mxfp8_ops.interleaving`` for where their bits are: row r's are in place already for the dtype for which the
    weight was packed.
    """
    BFLOAT16: gl.constexpr = EXACT or gl.bfloat16 == DTYPE
    if FOR_FLOAT16:
        one = word & _FLOAT16_IN_PLACE
        # One shift is left to the compiler, which has multipliers do it: with both, tiles take up to 4 % longer.
        upper = gl.inline_asm_elementwise(_UP_BY_1, "=r,r", [word], gl.int32, True, 1)
        other = ((word << 7) ^ upper) & _FLOAT16_IN_PLACE
        if BFLOAT16:
            one, other = _as_bfloat16(one), _as_bfloat16(other)
    else:
        one = word & _IN_PLACE
        other = _other_row(word, APART)
        if not BFLOAT16:
            one, other = _as_float16(one), _as_float16(other)
    return one, other


@gluon.jit
def _as_bfloat16(pair):
    return (pair & _SIGNS) | ((pair >> 3) & _BFLOAT16_MAGNITUDES)


@gluon.jit
def _as_float16(pair):
    return (pair & _SIGNS) | ((pair << 3) & _FLOAT16_MAGNITUDES)


@gluon.jit
def _other_row(word, APART: gl.constexpr):
    """Row r + 8's elements as bfloat16, of words packed for it: of two neighbours in five operations."""
    first, second = gl.split(gl.permute(gl.reshape(word, _by_neighbours(word.shape, APART)), (0, 2, 1)))
    both = gl.inline_asm_elementwise(_BYTES_OF_BOTH, "=r,r,r", [first, second], gl.int32, True, 1)
    first = ((first << 4) ^ both) & _IN_PLACE
    second = (gl.inline_asm_elementwise(_DOWN_BY_4, "=r,r", [second], gl.int32, True, 1) ^ both) & _IN_PLACE
    other = gl.reshape(gl.permute(gl.join(first, second), (0, 2, 1)), word.shape)
    return gl.convert_layout(other, word.type.layout, assert_trivial=True)


@gluon.constexpr_function
def _by_neighbours(shape, apart):
    return [math.prod(shape) // (2 * apart), 2, apart]


@gluon.jit
def scaled(pair, scale, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """Two elements times their scale, rounded to DTYPE once, in a word."""
    if EXACT:
        low = _exact(pair << 16, scale)
        high = _exact(pair & _UPPER, scale)
        ROUND: gl.constexpr = _ROUND_BFLOAT16 if gl.bfloat16 == DTYPE else _ROUND_FLOAT16
        return gl.inline_asm_elementwise(ROUND, "=r,f,f", [low, high], gl.int32, True, 1)
    elif gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(_MULTIPLY_BFLOAT16, "=r,r,r", [pair, scale], gl.int32, True, 1)
    else:
        return gl.inline_asm_elementwise(_MULTIPLY_FLOAT16, "=r,r,r", [pair, scale], gl.int32, True, 1)


@gluon.jit
def _exact(bits, scale):
    """An element times its scale in float32, from the upper half of a word: exact, NaN for the NaN code."""
    value = bits.to(gl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    value = gl.where((bits & 0x7FFF0000) == 0x07F00000, float("nan"), value)
    return value * scale


@gluon.jit
def operand(one, other, SHAPE: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr):
    """Pairs of rows r and r + 8 as a tile of the weight, whose rows have the bits of the pairs' first dimension before
    r3. Names registers: moves nothing.
    """
    one_0, one_1 = halves(one)
    other_0, other_1 = halves(other)
    bits = gl.join(gl.join(one_0, other_0), gl.join(one_1, other_1))  # first, r210, four of k, r3, k0
    tile = gl.reshape(gl.permute(bits, (0, 6, 1, 2, 3, 4, 5, 7)), SHAPE)
    return gl.convert_layout(tile.to(DTYPE, bitcast=True), OPERAND, assert_trivial=True)


@gluon.jit
def halves(word):
    """The lower and the upper 16 bits of words."""
    return gl.inline_asm_elementwise(_SPLIT, "=h,=h,r", [word], (gl.int16, gl.int16), True, 1)
