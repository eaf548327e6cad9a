"""The packed layout of a weight: its bytes and scales in the order in which tensor cores take them.

One int32 tensor ``[132 * blocks + 1, 32]``. The weight is cut into blocks of 128 rows by 128 elements of K (padded
with zeros under scale 127), all blocks of the first 128 rows before those of the next. The 132 rows of a block follow
each other:

- 128 rows of elements. A word holds four: of two rows r and r + 8, at two neighbouring elements of K (the second in
  the upper half), which is what a lane of a warp contributes to one matrix instruction. The four words that a lane
  needs for 16 rows by 32 elements are neighbours, so it reads 16 bytes at once. The two rows are interleaved bit by
  bit (see ``_interleave``). From the slowest to the fastest, the bits of a word's place are k6, r6, k5, r5 r4,
  r2 r1 r0, k2 k1, k4, k3: a quarter is 64 rows by 64 elements.
- 4 rows of scales: a word for each row of the weight with the four bytes of its 128 elements, the bits of its place
  r6, r5 r4, r2 r1 r0, r3.

One more row ends the tensor. Its first word tells whether some code needs exact (slower) decoding in bfloat16, its
second word whether in float16 (see ``_needs_exact``). Nothing else is added and nothing lost: ``unpack`` gives back
every bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_BIAS, SCALE_DTYPE

ROWS = 128
"""Rows of the weight in a block."""
COLUMNS = 128
"""Elements of K in a block."""
BLOCK_ROWS = 132
"""Rows of the packed tensor in a block: 128 of elements, 4 of scales."""
WORDS = 32
"""Words in a row of the packed tensor."""

PACKED_DTYPE = torch.int32

_CHUNK = 1 << 22  # elements packed at a time: bounds the memory of the intermediate results


def packed_shape(n: int, k: int) -> tuple[int, int]:
    """The shape of the packed tensor of a weight ``[n, k]``."""
    return _blocks(n, ROWS) * _blocks(k, COLUMNS) * BLOCK_ROWS + 1, WORDS


def check_packed(packed: Tensor, n: int, k: int) -> None:
    """Raises unless ``packed`` is a packed weight ``[n, k]``."""
    if packed.dtype != PACKED_DTYPE:
        raise TypeError(f"a packed weight must be int32, got {packed.dtype}: see mxfp8_ops.pack")
    if n <= 0:
        raise ValueError(f"n must be positive, got {n}")
    if k <= 0 or k % BLOCK_SIZE:
        raise ValueError(f"K must be a positive multiple of the block size {BLOCK_SIZE}, got K={k}")
    expected = packed_shape(n, k)
    if tuple(packed.shape) != expected:
        raise ValueError(
            f"the packed tensor of a weight [{n}, {k}] must be {list(expected)}, got {list(packed.shape)}: "
            "is it the result of mxfp8_ops.pack for this n and this K?"
        )


def pack(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight [N, K]`` and ``scale [N, K/32]``, checked already, as one packed tensor."""
    n, k = weight.shape
    across = _blocks(k, COLUMNS)
    packed = torch.empty(packed_shape(n, k), dtype=PACKED_DTYPE, device=weight.device)
    blocks = packed[:-1].view(-1, across, BLOCK_ROWS, WORDS)
    exact = torch.zeros(2, dtype=PACKED_DTYPE, device=weight.device)
    step = max(1, _CHUNK // (ROWS * COLUMNS * across))
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        rows = slice(first * ROWS, (first + len(part)) * ROWS)
        elements, scales = weight[rows].view(torch.uint8), scale[rows]
        exact |= _needs_exact(elements, scales)
        elements = _padded(elements, len(part) * ROWS, across * COLUMNS, 0)
        scales = _padded(scales, len(part) * ROWS, across * COLUMNS // BLOCK_SIZE, SCALE_BIAS)
        part[:, :, :ROWS] = _pack_elements(elements, len(part), across)
        part[:, :, ROWS:] = _pack_scales(scales, len(part), across)
    packed[-1] = 0
    packed[-1, :2] = exact
    return packed


def exact_marks(packed: Tensor) -> tuple[bool, bool]:
    """Whether some code of a packed weight needs exact decoding, in bfloat16 and in float16. Waits for its device."""
    bfloat16, float16 = packed[-1, :2].tolist()
    return bool(bfloat16), bool(float16)


def unpack(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The weight ``[n, k]`` and scale ``[n, k/32]`` that were packed, bit for bit."""
    across = _blocks(k, COLUMNS)
    blocks = packed[:-1].view(-1, across, BLOCK_ROWS, WORDS)
    weight = torch.empty(n, k, dtype=torch.uint8, device=packed.device)
    scale = torch.empty(n, k // BLOCK_SIZE, dtype=SCALE_DTYPE, device=packed.device)
    step = max(1, _CHUNK // (ROWS * COLUMNS * across))
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        rows = slice(first * ROWS, (first + len(part)) * ROWS)
        count = len(weight[rows])
        weight[rows] = _unpack_elements(part[:, :, :ROWS])[:count, :k]
        scale[rows] = _unpack_scales(part[:, :, ROWS:])[:count, : k // BLOCK_SIZE]
    return weight.view(ELEMENT_DTYPE), scale


# --- elements: row = (block, r6, r54, r3, r210), element = (block, k6, k5, k4, k3, k21, k0) --------------------------


def _pack_elements(elements: Tensor, down: int, across: int) -> Tensor:
    bits = elements.view(down, 2, 4, 2, 8, across, 2, 2, 2, 2, 4, 2).to(torch.int32)
    halves = _interleave(bits[:, :, :, 0], bits[:, :, :, 1])  # block, r6, r54, r210, block, k6, k5, k4, k3, k21, k0
    words = halves[..., 0] | (halves[..., 1] << 16)
    return words.permute(0, 4, 5, 1, 6, 2, 3, 9, 7, 8).reshape(down, across, ROWS, WORDS)


def _unpack_elements(words: Tensor) -> Tensor:
    down, across = words.shape[:2]
    words = words.reshape(down, across, 2, 2, 2, 4, 8, 4, 2, 2).permute(0, 3, 5, 6, 1, 2, 4, 8, 9, 7)
    rows = [torch.stack(_separate(half), 3) for half in (words & 0xFFFF, (words >> 16) & 0xFFFF)]
    return torch.stack(rows, -1).reshape(down * ROWS, across * COLUMNS).to(torch.uint8)


def _interleave(one: Tensor, other: Tensor) -> Tensor:
    """The codes of rows r and r + 8 in 16 bits, so that each becomes a bfloat16 in few operations: ``one`` lies
    where a bfloat16 of 2**-120 times its value has sign, exponent and mantissa (bits 15 and 10..4), and ``other``
    comes to lie there too when its low four bits move up by 4 and its upper bits: the sign by 4, the rest down by 4.
    """
    return ((one & 0x80) << 8) | ((one & 0x7F) << 4) | ((other & 0x80) << 4) | ((other & 0x70) << 8) | (other & 0x0F)


def _separate(half: Tensor) -> tuple[Tensor, Tensor]:
    one = ((half >> 8) & 0x80) | ((half >> 4) & 0x7F)
    other = ((half >> 4) & 0x80) | ((half >> 8) & 0x70) | (half & 0x0F)
    return one, other


# --- scales: row as above, a word of four bytes ----------------------------------------------------------------------


def _pack_scales(scales: Tensor, down: int, across: int) -> Tensor:
    bytes_ = scales.view(down, 2, 4, 2, 8, across, 4).permute(0, 5, 1, 2, 4, 3, 6).contiguous()
    return bytes_.view(PACKED_DTYPE).view(down, across, BLOCK_ROWS - ROWS, WORDS)


def _unpack_scales(words: Tensor) -> Tensor:
    down, across = words.shape[:2]
    bytes_ = words.contiguous().view(torch.uint8).view(down, across, 2, 4, 8, 2, 4)
    return bytes_.permute(0, 2, 3, 5, 4, 1, 6).reshape(down * ROWS, across * COLUMNS // BLOCK_SIZE)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _needs_exact(elements: Tensor, scales: Tensor) -> Tensor:
    """Whether fast decoding would be wrong somewhere, for bfloat16 and for float16, as two int32.

    Fast decoding multiplies an element, 2**-120 (bfloat16) or 2**-8 (float16) too small, by a power of two of that
    type, once. That power overflows for scale bytes above 134. In float16 it vanishes below 95 as well, which does
    no harm where the elements are zero. And it knows no NaN.
    """
    magnitudes = elements & 0x7F
    blocks = magnitudes.unflatten(-1, (-1, BLOCK_SIZE)).amax(-1)
    either = (blocks == 0x7F).any() | (scales > 134).any()
    return torch.stack([either, either | ((scales < 95) & (blocks > 0)).any()]).to(PACKED_DTYPE)


def _padded(tensor: Tensor, rows: int, columns: int, value: int) -> Tensor:
    if tuple(tensor.shape) == (rows, columns):
        return tensor.contiguous()
    out = tensor.new_full((rows, columns), value)
    out[: tensor.shape[0], : tensor.shape[1]] = tensor
    return out


def _blocks(length: int, size: int) -> int:
    return -(-length // size)
