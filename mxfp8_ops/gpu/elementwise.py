"""Dequant and quantize in Triton: one pass over memory each, the bits of the reference for every code.

Where the hardware does not convert e4m3 (``native``), integer arithmetic decodes and encodes it, as exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE
from ..packing import COLUMNS, packed_for
from .codes import element_to_float32, float32_to_element, moved_to_float32, scale_to_float32
from .launch import launch

_BLOCKS = 64  # blocks of 32 a program
_WARPS = 4

# Bits of both halves of a word, as the int32 that Triton takes: where a bfloat16 of 2**-120 times an element has them,
# and those that bytes of two words have there.
_SIGNS = tl.constexpr(0x80008000 - 2**32)
_MAGNITUDES = tl.constexpr(0x07F007F0)
_OF_FIRST = tl.constexpr(0x00F000F0)
_OF_SECOND = tl.constexpr(0x87008700 - 2**32)
_UPPER_HALF = tl.constexpr(0xFFFF0000 - 2**32)


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    """See ``mxfp8_ops.reference.dequant``: ``[..., K]`` elements and ``[..., K/32]`` scales, checked already."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    blocks = scale.numel()
    codes = weight.contiguous()
    arguments = codes if native else codes.view(torch.uint8), scale.contiguous(), out, blocks
    launch(mxfp8_dequant, (triton.cdiv(blocks, _BLOCKS),), arguments, (native, BLOCK_SIZE, _BLOCKS), _WARPS)
    return out


def dequant_packed(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """``dequant(*unpack(packed, n, k), dtype)`` in one pass, for a packed tensor that is contiguous."""
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    across = triton.cdiv(k, COLUMNS)
    launch(
        mxfp8_dequant_packed,
        (triton.cdiv(n, 16), across),
        (packed, out, n, k),
        (packed_for(packed) == torch.float16,),
        _WARPS,
    )
    return out


def quantize(x: Tensor, rule: str, native: bool) -> tuple[Tensor, Tensor]:
    """See ``mxfp8_ops.reference.quantize``: ``[..., K]`` values, checked already."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], x.shape[-1] // BLOCK_SIZE), dtype=SCALE_DTYPE, device=x.device)
    blocks = scale.numel()
    constants = native, rule == "rceil", BLOCK_SIZE, _BLOCKS
    launch(mxfp8_quantize, (triton.cdiv(blocks, _BLOCKS),), (x.contiguous(), codes, scale, blocks), constants, _WARPS)
    return codes.view(ELEMENT_DTYPE), scale


@triton.jit
def mxfp8_dequant(codes, scales, out, blocks, NATIVE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    # A lane takes 8 elements, not the 16 that it could load: so it stores 16 bytes, next to those of its neighbours.
    element = tl.max_contiguous(block * BLOCK + tl.arange(0, BLOCK)[None, :], (1, 8))
    mask = block < blocks
    code = tl.load(codes + element, mask=mask)
    value = code.to(tl.float32) if NATIVE else element_to_float32(code)
    value = value * scale_to_float32(tl.load(scales + block, mask=mask))
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def mxfp8_dequant_packed(packed, out, N, K, FOR_FLOAT16: tl.constexpr):
    """16 rows of a block of 128 by 128: see ``mxfp8_ops.packing`` for where their words lie. They are read in that
    order, which is 512 bytes at a time, and leave as rows of the weight: what is in between moves from lane to lane.
    """
    block = packed + (tl.program_id(0) // 8 * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (132 * 32)
    tile = tl.program_id(0) % 8  # r6, r5, r4
    row = tl.arange(0, 32)[:, None]  # k6, k5, r2 r1 r0
    pair = tl.arange(0, 16)[None, :]  # k2 k1, k4, k3
    place = tile // 4 * 1024 + tile % 4 * 128 + row // 16 * 2048 + row // 8 % 2 * 512 + row % 8 * 16
    word = tl.load(block + place + pair)
    scales = block + 4096 + tile * 16 + row % 8 * 2
    group = row // 8 * 8
    if FOR_FLOAT16:
        one = _from_float16(word)
        other = _from_float16((word << 7) ^ (word << 1))
    else:
        one = word & (_SIGNS | _MAGNITUDES)
        first, second = tl.split(tl.reshape(word, (32, 8, 2)))
        both = ((first >> 8) & _OF_FIRST) | ((second << 8) & _OF_SECOND)
        moved = tl.join(first << 4, ((second >> 4) & 0x0FFFFFFF) | (second << 28))
        other = tl.reshape((moved ^ both[:, :, None]) & (_SIGNS | _MAGNITUDES), (32, 16))
    one = _pairs(one, (tl.load(scales) >> group) & 0xFF)
    other = _pairs(other, (tl.load(scales + 1) >> group) & 0xFF)
    bits = tl.join(one.to(out.dtype.element_ty), other.to(out.dtype.element_ty))
    bits = tl.reshape(bits, (2, 2, 8, 4, 2, 2, 2, 2))  # k6, k5, r2 r1 r0, k2 k1, k4, k3, k0, r3
    value = tl.reshape(tl.permute(bits, (7, 2, 0, 1, 4, 5, 3, 6)), (16, 128))
    n = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    k = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    tl.store(out + n.to(tl.int64) * K + k, value, mask=(n < N) & (k < K))


@triton.jit
def _from_float16(word):
    """Bits of elements from where a float16 of 2**-8 times them has them."""
    return (word & _SIGNS) | ((word >> 3) & _MAGNITUDES)


@triton.jit
def _pairs(word, scale):
    """The two elements of one row in each word, times their scale, in float32. In each half of a word are the upper 16
    bits of 2**-120 times an element.
    """
    power = scale_to_float32(scale)
    return tl.join(moved_to_float32(word << 16) * power, moved_to_float32(word & _UPPER_HALF) * power)


@triton.jit
def mxfp8_quantize(
    x, codes, scales, blocks, NATIVE: tl.constexpr, RCEIL: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
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
    code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if NATIVE else float32_to_element(scaled)
    code = tl.where(not_finite[:, None], 0x7F, code)
    tl.store(codes + element, code.to(tl.uint8), mask=mask[:, None])
    tl.store(scales + block, tl.where(not_finite, 255, exponent).to(tl.uint8), mask=mask)
