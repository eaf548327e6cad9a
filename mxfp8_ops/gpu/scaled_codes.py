"""Codes of elements times their scale, in registers: rounded once, and no code of an element or of a scale is special.

The hardware converts two codes of e4m3 at a time to float16, which holds all their values: NVIDIA's chips from sm_89
on. From sm_90 on it multiplies two elements of bfloat16 at a time, and what else is needed for that; before, elements
become float32 in between.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Two codes in 16 bits and their factors to two elements in a word, the first in its lower half.
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
# Four codes in a word and their scale, a float32, to four elements. Products with any scale are exact in float32
# (without .ftz: subnormal ones, too).
_BY_FLOAT32 = gl.constexpr("""{
.reg .b16 low, high, h0, h1, h2, h3;
.reg .b32 first, second;
.reg .f32 f0, f1, f2, f3;
mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 first, low;
cvt.rn.f16x2.e4m3x2 second, high;
mov.b32 {h0, h1}, first;
mov.b32 {h2, h3}, second;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
cvt.f32.f16 f2, h2;
cvt.f32.f16 f3, h3;
mul.f32 f0, f0, $5;
mul.f32 f1, f1, $5;
mul.f32 f2, f2, $5;
mul.f32 f3, f3, $5;
cvt.rn.DTYPEx2.f32 first, f1, f0;
cvt.rn.DTYPEx2.f32 second, f3, f2;
mov.b32 {$0, $1}, first;
mov.b32 {$2, $3}, second;
}""")
_BY_FLOAT32_TO_BFLOAT16 = gl.constexpr(_BY_FLOAT32.value.replace("DTYPE", "bf16"))
_BY_FLOAT32_TO_FLOAT16 = gl.constexpr(_BY_FLOAT32.value.replace("DTYPE", "f16"))
_FOUR_HALVES = gl.constexpr((gl.int16, gl.int16, gl.int16, gl.int16))


@gluon.jit
def scaled_elements(pairs, one, other, DTYPE: gl.constexpr):
    """Pairs of codes in 16 bits times their factors, each in both halves of a word: two elements in a word, the first
    in its lower half.
    """
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(_TO_BFLOAT16, "=r,h,r", [pairs, one], gl.int32, True, 1)
    else:
        return gl.inline_asm_elementwise(_TO_FLOAT16, "=r,h,r,r", [pairs, one, other], gl.int32, True, 1)


@gluon.jit
def elements_by_float32(words, scales, DTYPE: gl.constexpr):
    """The four elements of DTYPE in words of four codes, times their scales, float32."""
    TO_DTYPE: gl.constexpr = _BY_FLOAT32_TO_BFLOAT16 if gl.bfloat16 == DTYPE else _BY_FLOAT32_TO_FLOAT16
    return gl.inline_asm_elementwise(TO_DTYPE, "=h,=h,=h,=h,r,f", [words, scales], _FOUR_HALVES, True, 1)


@gluon.jit
def factors_of_scales(codes, DTYPE: gl.constexpr):
    """What elements of DTYPE are multiplied by, first by one factor and then by the other, for the scales of two codes,
    the halves of words. bfloat16 has every scale: the other factor is not used.
    """
    if gl.bfloat16 == DTYPE:
        scales = _bfloat16_scales(codes)
        return scales, scales
    else:
        return _float16_scales(codes)


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
