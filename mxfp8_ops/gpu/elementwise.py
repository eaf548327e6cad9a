"""Dequant and quantize in Triton: one pass over memory each, the bits of the reference for every code.

Decoding and encoding e4m3 is integer arithmetic here, not the hardware's conversion: exact on every GPU, and
hidden behind the memory traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE
from .codes import element_to_float32, float32_to_element, scale_to_float32

_BLOCKS = 128  # blocks of 32 a program
_WARPS = 4


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``mxfp8_ops.reference.dequant``: ``[..., K]`` elements and ``[..., K/32]`` scales, checked already."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    blocks = scale.numel()
    codes = weight.contiguous().view(torch.uint8)
    _dequant_kernel[(triton.cdiv(blocks, _BLOCKS),)](
        codes, scale.contiguous(), out, blocks, BLOCK=BLOCK_SIZE, BLOCKS=_BLOCKS, num_warps=_WARPS
    )
    return out


def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """See ``mxfp8_ops.reference.quantize``: ``[..., K]`` values, checked already."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], x.shape[-1] // BLOCK_SIZE), dtype=SCALE_DTYPE, device=x.device)
    blocks = scale.numel()
    _quantize_kernel[(triton.cdiv(blocks, _BLOCKS),)](
        x.contiguous(),
        codes,
        scale,
        blocks,
        RCEIL=rule == "rceil",
        BLOCK=BLOCK_SIZE,
        BLOCKS=_BLOCKS,
        num_warps=_WARPS,
    )
    return codes.view(ELEMENT_DTYPE), scale


@triton.jit
def _dequant_kernel(codes, scales, out, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    element = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = block < blocks
    value = element_to_float32(tl.load(codes + element, mask=mask))
    value = value * scale_to_float32(tl.load(scales + block, mask=mask))
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_kernel(x, codes, scales, blocks, RCEIL: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = block < blocks
    value = tl.load(x + element, mask=mask[:, None], other=0.0).to(tl.float32)
    amax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = (amax >> 23) - 8
    if RCEIL:
        exponent += tl.where((amax & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.maximum(exponent, 0)
    not_finite = amax >= 0x7F800000
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(value * inverse[:, None], -448.0), 448.0)
    code = tl.where(not_finite[:, None], 0x7F, float32_to_element(scaled))
    tl.store(codes + element, code.to(tl.uint8), mask=mask[:, None])
    tl.store(scales + block, tl.where(not_finite, 255, exponent).to(tl.uint8), mask=mask)
