"""The codes of the format in Triton: decoding and encoding by integer arithmetic, exact on every GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_to_float32(code):
    """``2**(code - 127)`` by its bits; 255 is NaN, 0 the subnormal 2**-127."""
    code = code.to(tl.int32)
    bits = tl.where(code == 255, 0x7FC00000, tl.where(code == 0, 0x00400000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def element_to_float32(code):
    """The value of an e4m3 code: its bits as a float32 are 2**120 too small."""
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True))
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def moved_to_float32(bits):
    """The same of an e4m3 code whose sign, exponent and mantissa are where a float32 has them, as in packed weights."""
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((bits & 0x7FFF0000) == 0x07F00000, float("nan"), value)


@triton.jit
def float32_to_element(value):
    """The e4m3 code nearest to a value of at most 448, ties to even.

    Normal values round in the bits that are dropped. Below 2**-6 the codes are multiples of 2**-9, which is the
    unit of float32 at 2**14: an addition rounds to them.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
