"""From the codes of a weight as it is stored, in shared memory, to registers, as Hopper's matrix instruction takes its
operand A.

A tile is 64 or 128 rows of the weight by 64 elements of K, swizzled by TMA. A lane reads two elements at a time,
without bank conflicts: the instruction's order of K leaves it no longer runs. The hardware converts them to float16,
which holds every value of e4m3. Then they are multiplied by their scale such that the product is rounded once: no code
of an element or of a scale is special here.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fragments import each_twice, halves, two_bytes
from .versions import reinterpret

# Two codes in 16 bits and their scale to two elements in a word, the first in its lower half.
_TO_BFLOAT16 = gl.constexpr("""{
.reg .b16 low, high;
.reg .b32 both;
.reg .f32 first, second;
cvt.rn.f16x2.e4m3x2 both, $1;
mov.b32 {low, high}, both;
cvt.f32.f16 first, low;
cvt.f32.f16 second, high;
cvt.rn.bf16x2.f32 both, second, first;
mul.rn.bf16x2 $0, both, $2;
}""")
_TO_FLOAT16 = gl.constexpr("""{
.reg .b32 both;
cvt.rn.f16x2.e4m3x2 both, $1;
mul.rn.f16x2 both, both, $2;
mul.rn.f16x2 $0, both, $3;
}""")


@gluon.jit
def scale_places(scales, column, N, K, ROWS: gl.constexpr, MMA: gl.constexpr):
    """Pointers to the first word of scales, of four codes, of each row of a tile: ``scales [N, K / 128]``. A lane has
    those of its rows; rows past the end are the last one again.
    """
    groups = gl.reshape(_any_pairs(ROWS, MMA), [ROWS, 2, 16])
    row = column + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, groups.type.layout)))
    return scales + gl.minimum(row, N - 1).to(gl.int64) * (K // 128)


@gluon.jit
def canonical_fragment(codes, scales, HALF: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Operand A ``[ROWS, 64]`` in DTYPE: the half (0 or 1) of a block's elements whose ``codes`` these are, in shared
    memory, times the block's ``scales``, words in registers.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PAIR: gl.constexpr = _any_pairs(ROWS, MMA).type.layout
    pairs = reinterpret(codes, gl.int16, [ROWS, 32], gl.NVMMASharedLayout(64, 16, 2)).load(PAIR)
    two_scales = two_bytes(scales, 2 * HALF, 2 * HALF + 1, 2)
    if gl.bfloat16 == DTYPE:
        scale = _of_pairs(_bfloat16_scales(two_scales), pairs)
        words = gl.inline_asm_elementwise(_TO_BFLOAT16, "=r,h,r", [pairs, scale], gl.int32, True, 1)
    else:
        one, other = _float16_scales(two_scales)
        one = _of_pairs(one, pairs)
        other = _of_pairs(other, pairs)
        words = gl.inline_asm_elementwise(_TO_FLOAT16, "=r,h,r,r", [pairs, one, other], gl.int32, True, 1)
    low, high = halves(words)
    tile = gl.reshape(gl.join(low, high), [ROWS, 64])
    return gl.convert_layout(tile.to(DTYPE, bitcast=True), OPERAND, assert_trivial=True)


@gluon.jit
def _any_pairs(ROWS: gl.constexpr, MMA: gl.constexpr):
    """Some pairs ``[ROWS, 32]`` in the layout that makes their elements lie as the operand wants them."""
    tile = gl.full([ROWS, 64], 0, gl.int8, gl.DotOperandLayout(0, MMA, 2))
    pair, _ = gl.split(gl.reshape(tile, [ROWS, 32, 2]))
    return pair


@gluon.jit
def _of_pairs(scales, pairs):
    """What the pairs of each row are multiplied by: the lower half of its scales, twice, for the first group of 32
    elements, the upper half for the second.
    """
    ROWS: gl.constexpr = pairs.shape[0]
    groups = gl.reshape(pairs, [ROWS, 2, 16])
    first, second = each_twice(scales)
    both = gl.convert_layout(gl.join(first, second), gl.SliceLayout(2, groups.type.layout), assert_trivial=True)
    both, _ = gl.broadcast(gl.expand_dims(both, 2), groups)
    return gl.convert_layout(gl.reshape(both, [ROWS, 32]), pairs.type.layout, assert_trivial=True)


@gluon.jit
def _bfloat16_scales(codes):
    """The scales of two codes, the halves of a word: every scale is a bfloat16, 2**-127 a subnormal one, so that the
    product of the instruction is exact until it is rounded.

    A code is the exponent. But 0 and 255 become zero and infinity so, which are what equals twice itself: their highest
    bit of mantissa is missing.
    """
    both = codes << 7
    equal = _halfwise("set.eq.u32.bf16x2", both, _halfwise("add.rn.bf16x2", both, both))
    return both | (equal & 0x00400040)


@gluon.jit
def _float16_scales(codes):
    """The scales of two codes, the halves of a word, as two factors each, for float16 has not every power of two.

    The first is the normal number nearest to the scale, 2**-14 to 2**15, and NaN for code 255. The product with it is
    exact (e4m3 has multiples of 2**-9, float16 of 2**-24), or infinite as the whole product is. The second is what the
    scale is more than that, 2**-19 to 2**10, or zero: beyond, every product has become zero or infinite.
    """
    near = _between(codes, 127 - 14, 127 + 15)
    first = (near - 0x00010001 * (127 - 15)) << 10  # an exponent of float16 is 15 more
    nan = _halfwise("set.eq.u32.f16x2", codes, 0x00FF00FF)  # all ones, or zero
    more = _between(codes - near + 0x00800080, 128 - 20, 128 + 10)  # 128 more, so that no half is negative
    second = (more - 0x00010001 * (128 - 20)) << 10  # 2**5 times too large, or 2**-19 would be no normal number
    return first | (nan & 0x7E007E00), _halfwise("mul.rn.f16x2", second, 0x28002800)


@gluon.jit
def _between(halves, LEAST: gl.constexpr, MOST: gl.constexpr):
    """The halves of words, not negative, but at least and at most so much."""
    return _halfwise("min.u16x2", _halfwise("max.u16x2", halves, LEAST * 0x00010001), MOST * 0x00010001)


@gluon.jit
def _halfwise(INSTRUCTION: gl.constexpr, one, other):
    """An instruction of two words that takes their halves by themselves."""
    return gl.inline_asm_elementwise(_of_two(INSTRUCTION), "=r,r,r", [one, other], gl.int32, True, 1)


@gluon.constexpr_function
def _of_two(instruction):
    return f"{instruction} $0, $1, $2;"
