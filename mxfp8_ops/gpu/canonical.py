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

from .fragments import bytes_in_halves, each_twice, float16_in_both_halves, halves
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
    if gl.bfloat16 == DTYPE:
        one, other = _bfloat16_scales(bytes_in_halves(scales, 2 * HALF, 2 * HALF + 1))
        scale = _of_pairs(one, other, pairs)
        words = gl.inline_asm_elementwise(_TO_BFLOAT16, "=r,h,r", [pairs, scale], gl.int32, True, 1)
    else:
        one, other = _float16_scales(scales, 2 * HALF)
        next_one, next_other = _float16_scales(scales, 2 * HALF + 1)
        one = _of_pairs(one, next_one, pairs)
        other = _of_pairs(other, next_other, pairs)
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
def _of_pairs(first, second, pairs):
    """What the pairs of each row are multiplied by: of the first group of 32 elements, and of the second."""
    ROWS: gl.constexpr = pairs.shape[0]
    groups = gl.reshape(pairs, [ROWS, 2, 16])
    both = gl.convert_layout(gl.join(first, second), gl.SliceLayout(2, groups.type.layout), assert_trivial=True)
    both, _ = gl.broadcast(gl.expand_dims(both, 2), groups)
    return gl.convert_layout(gl.reshape(both, [ROWS, 32]), pairs.type.layout, assert_trivial=True)


@gluon.jit
def _bfloat16_scales(codes):
    """The scales of two codes, the halves of a word, each as a bfloat16 in both halves of one: every scale is one,
    2**-127 a subnormal one, so that the product of the instruction is exact until it is rounded.

    A code is the exponent. But 0 and 255 become zero and infinity so, which are what equals twice itself: their highest
    bit of mantissa is missing.
    """
    both = codes << 7
    twice = gl.inline_asm_elementwise("add.rn.bf16x2 $0, $1, $1;", "=r,r", [both], gl.int32, True, 1)
    equal = gl.inline_asm_elementwise("set.eq.u32.bf16x2 $0, $1, $2;", "=r,r,r", [both, twice], gl.int32, True, 1)
    return each_twice(both | (equal & 0x00400040))


@gluon.jit
def _float16_scales(scales, GROUP: gl.constexpr):
    """One of the four scales in a word as two factors, for float16 has not every power of two. The first is never less
    than 2**-10, so that the product with it is exact (e4m3 has multiples of 2**-9), or infinite as the whole product
    is. Both stop where every product has become infinite or zero.
    """
    code = (scales >> (8 * GROUP)) & 0xFF
    one = gl.minimum(gl.maximum(code, 127 - 10), 127 + 15)
    other = gl.minimum(gl.maximum(code - one + 127, 127 - 24), 127 + 15)
    return float16_in_both_halves(gl.where(code == 255, 0x7FC00000, one << 23)), float16_in_both_halves(other << 23)
