"""Dequant and quantize in Triton: one pass over memory each, the bits of the reference for every code.

Where the hardware does not convert e4m3 (``native``), integer arithmetic decodes and encodes it, as exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE
from ..packing import COLUMNS
from .codes import element_to_float32, float32_to_element, scale_to_float32
from .launch import launch

_BLOCKS = 64  # blocks of 32 a program
_WARPS = 4


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    """See ``mxfp8_ops.reference.dequant``: ``[..., K]`` elements and ``[..., K/32]`` scales, checked already."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    blocks = scale.numel()
    codes = weight.contiguous()
    arguments = codes if native else codes.view(torch.uint8), scale.contiguous(), out, blocks
    launch(_dequant_kernel, (triton.cdiv(blocks, _BLOCKS),), arguments, (native, BLOCK_SIZE, _BLOCKS), _WARPS)
    return out


def dequant_packed(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """``dequant(*unpack(packed, n, k), dtype)`` in one pass, for a packed tensor that is contiguous."""
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    across = triton.cdiv(k, COLUMNS)
    launch(_dequant_packed_kernel, (triton.cdiv(n, 16), across), (packed, out, n, k), (), _WARPS)
    return out


def quantize(x: Tensor, rule: str, native: bool) -> tuple[Tensor, Tensor]:
    """See ``mxfp8_ops.reference.quantize``: ``[..., K]`` values, checked already."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], x.shape[-1] // BLOCK_SIZE), dtype=SCALE_DTYPE, device=x.device)
    blocks = scale.numel()
    constants = native, rule == "rceil", BLOCK_SIZE, _BLOCKS
    launch(_quantize_kernel, (triton.cdiv(blocks, _BLOCKS),), (x.contiguous(), codes, scale, blocks), constants, _WARPS)
    return codes.view(ELEMENT_DTYPE), scale


@triton.jit
def _dequant_kernel(codes, scales, out, blocks, NATIVE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    # A lane takes 8 elements, not the 16 that it could load: so it stores 16 bytes, next to those of its neighbours.
    element = tl.max_contiguous(block * BLOCK + tl.arange(0, BLOCK)[None, :], (1, 8))
    mask = block < blocks
    code = tl.load(codes + element, mask=mask)
    value = code.to(tl.float32) if NATIVE else element_to_float32(code)
    value = value * scale_to_float32(tl.load(scales + block, mask=mask))
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dequant_packed_kernel(packed, out, N, K):
    """16 rows of a block of 128 by 128: see ``mxfp8_ops.packing`` for where their words lie."""
    block = packed + (tl.program_id(0) // 8 * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (132 * 32)
    tile = tl.program_id(0) % 8  # r6, r5, r4
    row = tl.arange(0, 8)[:, None]
    pair = tl.arange(0, 64)[None, :]  # of elements: k6, k5, k4, k3, k2 k1
    place = tile // 4 * 1024 + tile % 4 * 128 + row * 16
    place += pair // 32 * 2048 + pair // 16 % 2 * 512 + pair // 8 % 2 * 2 + pair // 4 % 2 + pair % 4 * 4
    word = tl.load(block + place)
    scales = block + 4096 + tile * 16 + row * 2
    group = pair // 16 * 8
    for other in tl.static_range(2):  # rows r and r + 8
        scale = scale_to_float32((tl.load(scales + other) >> group) & 0xFF)
        first = element_to_float32(_code_of_row(word, other)) * scale
        second = element_to_float32(_code_of_row(word >> 16, other)) * scale
        n = tl.program_id(0) * 16 + other * 8 + row
        k = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
        value = tl.reshape(tl.join(first, second), (8, 128))
        tl.store(out + n.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=(n < N) & (k < K))


@triton.jit
def _code_of_row(half, other: tl.constexpr):
    """Row r's code, or row r + 8's, of the two that are interleaved in 16 bits."""
    if other:
        return ((half >> 4) & 0x80) | ((half >> 8) & 0x70) | (half & 0x0F)
    else:
        return ((half >> 8) & 0x80) | ((half >> 4) & 0x7F)


@triton.jit
def _quantize_kernel(
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
