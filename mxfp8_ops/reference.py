"""The eager reference: what every operator of this package means, in plain torch.

Each function has the signature of its operator. All other paths (kernels, compiled graphs, folded
constants) are tested against these, bit for bit wherever the result is exact.

Source of the format: OCP Microscaling Formats (MX) Specification v1.0, sections 5.1 (E8M0 scales, 255 is
NaN), 5.2 (MXFP8) and 6.3 (the "floor" rule).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import (
    BLOCK_SIZE,
    ELEMENT_DTYPE,
    ELEMENT_MAX,
    ELEMENT_MAX_EXPONENT,
    ELEMENT_NAN,
    SCALE_BIAS,
    SCALE_DTYPE,
    SCALE_NAN,
)

_FLOAT32_MANTISSA_BITS = 23
_FLOAT32_INFINITY = 0x7F800000
_FLOAT32_NAN = 0x7FC00000
_TWO_TO_MINUS_127 = 0x00400000  # a float32 subnormal: the exponent field alone cannot say it
_MANTISSA_OF_1_75 = 0x600000  # 448 = 1.75 * 2**8


def scale_to_float32(scale: Tensor) -> Tensor:
    """``2**(scale - 127)`` of E8M0 bytes, exact; byte 255 is NaN."""
    bits = scale.to(torch.int32) << _FLOAT32_MANTISSA_BITS
    bits = torch.where(scale == 0, _TWO_TO_MINUS_127, bits)
    bits = torch.where(scale == SCALE_NAN, _FLOAT32_NAN, bits)
    return bits.view(torch.float32)


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``e4m3(weight) * 2**(scale - 127)``: exact in float32, then rounded once to ``dtype``."""
    blocks = weight.to(torch.float32).unflatten(-1, (-1, BLOCK_SIZE))
    return (blocks * scale_to_float32(scale).unsqueeze(-1)).to(dtype).flatten(-2).contiguous()


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on the dequantized weight, in x's dtype; activations are not quantized."""
    return F.linear(x, dequant(weight, scale, x.dtype), bias).contiguous()


def quantize(x: Tensor, rule: str = "rceil") -> tuple[Tensor, Tensor]:
    """Elements and scales of ``x``: the scale from the block's largest magnitude, the elements rounded
    to nearest even and saturated at 448.

    "floor" takes ``2**floor(log2(amax)) / 2**8`` (OCP), "rceil" the smallest power of two that does not
    saturate. Exponents are read from bits: ``log2`` in float32 is wrong just above ``448 * 2**k``.
    """
    blocks = x.to(torch.float32).unflatten(-1, (-1, BLOCK_SIZE))
    amax = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(-1)  # magnitudes order like their bit patterns
    exponent = (amax >> _FLOAT32_MANTISSA_BITS) - ELEMENT_MAX_EXPONENT  # keeps float32's bias, which is E8M0's
    if rule == "rceil":
        exponent = exponent + ((amax & 0x7FFFFF) > _MANTISSA_OF_1_75)
    exponent = exponent.clamp(min=0)
    not_finite = amax >= _FLOAT32_INFINITY
    scale = torch.where(not_finite, SCALE_NAN, exponent).to(SCALE_DTYPE)

    inverse = ((2 * SCALE_BIAS - exponent) << _FLOAT32_MANTISSA_BITS).view(torch.float32)
    elements = (blocks * inverse.unsqueeze(-1)).clamp(-ELEMENT_MAX, ELEMENT_MAX).to(ELEMENT_DTYPE)
    codes = elements.view(torch.uint8).masked_fill(not_finite.unsqueeze(-1), ELEMENT_NAN)
    return codes.flatten(-2).contiguous().view(ELEMENT_DTYPE), scale.contiguous()
