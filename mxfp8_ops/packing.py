"""The packed layout of a weight: its bytes and scales in the order in which tensor cores take them.

One int32 tensor ``[132 * blocks + 1 or 2, 32]``. The weight is cut into blocks of 128 rows by 128 elements of K (padded
with zeros under scale 127), all blocks of the first 128 rows before those of the next. The 132 rows of a block follow
each other:

- 128 rows of elements. A word holds four: of two rows r and r + 8, at two neighbouring elements of K (the second in
  the upper half), which is what a lane of a warp contributes to one matrix instruction. The four words that a lane
  needs for 16 rows by 32 elements are neighbours, so it reads 16 bytes at once. The two rows are interleaved bit by
  bit, as is best for x of bfloat16 or for x of float16 (see ``mxfp8_ops.interleaving``). From the slowest to the
  fastest, the bits of a word's place are k6, r6, k5, r5 r4, r2 r1 r0, k2 k1, k4, k3: a quarter is 64 rows by 64
  elements.
- 4 rows of scales: a word for each row of the weight with the four bytes of its 128 elements, the bits of its place
  r6, r5 r4, r2 r1 r0, r3.

One more row follows. Its first word tells whether some code needs exact (slower) decoding in bfloat16, its second word
whether in float16 (see ``_needs_exact``). A weight that is interleaved for float16 ends with another row, of nothing:
its length tells. Nothing else is added and nothing lost: ``unpack`` gives back every bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_BIAS, SCALE_DTYPE
from .interleaving import interleave, separate

ROWS = 128
"""Rows of the weight in a block."""
COLUMNS = 128
"""Elements of K in a block."""
BLOCK_ROWS = 132
"""Rows of the packed tensor in a block: 128 of elements, 4 of scales."""
WORDS = 32
"""Words in a row of the packed tensor."""

PACKED_DTYPE = torch.int32

PACKED_FOR = {torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of x for which a weight can be packed, and how many rows follow its blocks. It can be multiplied by x of
either, and more slowly by that of the other one.
"""

_CHUNK = 1 << 21
"""Elements packed at a time on a CPU. With the intermediate results, three bytes for each, they stay in its caches."""
_DEVICE_CHUNK = 1 << 24
"""The same on other devices, where larger parts mean fewer launches."""
_GAP = 64
"""Bytes between the rows of an intermediate result: rows at a distance of a power of two compete for a few lines of a
CPU's cache."""


def packed_shape(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """The shape of the packed tensor of a weight ``[n, k]``, packed for x of ``dtype``."""
    return _blocks(n, ROWS) * _blocks(k, COLUMNS) * BLOCK_ROWS + PACKED_FOR[dtype], WORDS


def packed_for(packed: Tensor) -> torch.dtype:
    """For which dtype of x a weight was packed."""
    return torch.float16 if packed.shape[0] % BLOCK_ROWS == PACKED_FOR[torch.float16] else torch.bfloat16


def check_packed_for(dtype: torch.dtype) -> None:
    """Raises unless a weight can be packed for x of ``dtype``."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if dtype not in PACKED_FOR:
        raise ValueError(
            f"a weight is packed for x of bfloat16 or float16, got dtype={dtype}: "
            "for x of another dtype use the weight as it is"
        )


def check_packed(packed: Tensor, n: int, k: int) -> None:
    """Raises unless ``packed`` is a packed weight ``[n, k]``."""
    if packed.dtype != PACKED_DTYPE:
        raise TypeError(f"a packed weight must be int32, got {packed.dtype}: see mxfp8_ops.pack")
    if n <= 0:
        raise ValueError(f"n must be positive, got {n}")
    if k <= 0 or k % BLOCK_SIZE:
        raise ValueError(f"K must be a positive multiple of the block size {BLOCK_SIZE}, got K={k}")
    if all(tuple(packed.shape) != packed_shape(n, k, dtype) for dtype in PACKED_FOR):
        expected = " or ".join(str(list(packed_shape(n, k, dtype))) for dtype in PACKED_FOR)
        raise ValueError(
            f"the packed tensor of a weight [{n}, {k}] must be {expected}, got {list(packed.shape)}: "
            "is it the result of mxfp8_ops.pack for this n and this K?"
        )


def pack(weight: Tensor, scale: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``weight [N, K]`` and ``scale [N, K/32]``, checked already, as one packed tensor for x of ``dtype``, in ``out``
    if there is one.
    """
    n, k = weight.shape
    shape = packed_shape(n, k, dtype)
    packed = torch.empty(shape, dtype=PACKED_DTYPE, device=weight.device) if out is None else out
    packed[-PACKED_FOR[dtype] :] = 0
    exact = _marks(packed)
    for part, rows, columns, groups in _parts(packed, k):
        elements = _padded(weight.view(torch.uint8)[rows, columns], part, COLUMNS, 0)
        scales = _padded(scale.view(torch.uint8)[rows, groups], part, COLUMNS // BLOCK_SIZE, SCALE_BIAS)
        exact |= _needs_exact(elements, scales)
        _pack_elements(elements, part, dtype)
        _pack_scales(scales, part)
    return packed


def exact_marks(packed: Tensor) -> tuple[bool, bool]:
    """Whether some code of a packed weight needs exact decoding, in bfloat16 and in float16. Waits for its device."""
    bfloat16, float16 = _marks(packed).tolist()
    return bool(bfloat16), bool(float16)


def _marks(packed: Tensor) -> Tensor:
    return packed[-PACKED_FOR[packed_for(packed)], :2]


def unpack(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The weight ``[n, k]`` and scale ``[n, k/32]`` that were packed, bit for bit."""
    weight = torch.empty(n, k, dtype=torch.uint8, device=packed.device)
    scale = torch.empty(n, k // BLOCK_SIZE, dtype=SCALE_DTYPE, device=packed.device)
    for part, rows, columns, groups in _parts(packed, k):
        _store(_unpack_elements(part, packed_for(packed)), weight[rows, columns])
        _store(_unpack_scales(part), scale[rows, groups])
    return weight.view(ELEMENT_DTYPE), scale


def _parts(packed: Tensor, k: int) -> Iterator[tuple[Tensor, slice, slice, slice]]:
    """Some blocks ``[down, across, 132, 32]`` at a time, with their rows and columns of the weight and of the scale."""
    across = _blocks(k, COLUMNS)
    blocks = packed[: -PACKED_FOR[packed_for(packed)]].view(-1, across, BLOCK_ROWS, WORDS)
    count = max(1, (_CHUNK if packed.is_cpu else _DEVICE_CHUNK) // (ROWS * COLUMNS))
    high, wide = max(1, count // across), min(count, across)
    for down, right in itertools.product(range(0, len(blocks), high), range(0, across, wide)):
        part = blocks[down : down + high, right : right + wide]
        rows = slice(down * ROWS, (down + high) * ROWS)
        columns, groups = (slice(right * width, (right + wide) * width) for width in (COLUMNS, COLUMNS // BLOCK_SIZE))
        yield part, rows, columns, groups


# --- elements: row = (block, r6, r54, r3, r210), element = (block, k6, k5, k43, k210) --------------------------------
#
# First, elements are sorted: the eight neighbours of k210 move together, in an int64, to k43, r3, block, k6, r6, k5,
# r54, r210. But for k43 this is the order of the packed tensor, so that what follows goes through memory in long runs.
# Then the two halves along r3 are interleaved, until r3, k1, k0 and the bits of the codes are in place within int32 (k2
# is, from the start). These words go where they belong.


def _pack_elements(elements: Tensor, part: Tensor, dtype: torch.dtype) -> None:
    one, other, moves = _halves(_by_place(elements).contiguous(), part)
    interleave(one, other, dtype)
    for half, words in moves:
        words.copy_(half)


def _unpack_elements(part: Tensor, dtype: torch.dtype) -> Tensor:
    elements = _rows(part, COLUMNS)
    unsorted = _by_place(elements)
    in_order = torch.empty(unsorted.shape, dtype=unsorted.dtype, device=part.device)
    one, other, moves = _halves(in_order, part)
    for half, words in moves:
        half.copy_(words)
    separate(one, other, dtype)
    for k5 in range(2):  # in one copy the runs would be short: of both k5, with all of k6 and the blocks far away
        unsorted.select(6, k5).copy_(in_order.select(6, k5))
    return elements


def _by_place(elements: Tensor) -> Tensor:
    """Rows of whole blocks as int64 ``[k43, r3, down, across, k6, r6, k5, r54, r210]``, a view."""
    return (
        elements.view(torch.int64)
        .unflatten(1, (-1, 2, 2, 4))
        .unflatten(0, (-1, 2, 4, 2, 8))
        .permute(8, 3, 0, 5, 6, 1, 7, 2, 4)
    )


def _halves(elements: Tensor, part: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The halves of sorted elements as int32, and which of their pieces belongs where in a part after the exchanges."""
    down, across = part.shape[:2]
    one, other = elements.view(PACKED_DTYPE).view(4, 2, down, across, -1, 2).unbind(1)
    words = part[:, :, :ROWS].reshape(down, across, -1, 2, 2, 4)  # down, across, k6 .. r210, k2, k1, k43
    return one, other, [(half[i], words[..., k1, i]) for k1, half in enumerate((other, one)) for i in range(4)]


# --- scales: row as above, a word of four bytes ----------------------------------------------------------------------


def _pack_scales(scales: Tensor, part: Tensor) -> None:
    words = _scale_words(scales)
    part[:, :, ROWS:].view(words.shape).copy_(words)


def _unpack_scales(part: Tensor) -> Tensor:
    scales = _rows(part, COLUMNS // BLOCK_SIZE)
    words = _scale_words(scales)
    words.copy_(part[:, :, ROWS:].reshape(words.shape))
    return scales


def _scale_words(scales: Tensor) -> Tensor:
    """Rows of whole blocks as int32 ``[down, across, r6, r54, r210, r3]``, a view."""
    return scales.view(PACKED_DTYPE).unflatten(0, (-1, 2, 4, 2, 8)).permute(0, 5, 1, 2, 4, 3)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _needs_exact(elements: Tensor, scales: Tensor) -> Tensor:
    """Whether fast decoding would be wrong somewhere, for bfloat16 and for float16.

    Fast decoding multiplies an element, 2**-120 (bfloat16) or 2**-8 (float16) too small, by a power of two of that
    type, once. That power overflows for scale bytes above 134. In float16 it vanishes below 95 as well, which does
    no harm where the elements are zero. And it knows no NaN.
    """
    nan = (elements.view(torch.int8).amax() == 0x7F) | (elements.amax() == 0xFF)
    either = nan | (scales.amax() > 134)
    first, *others = elements.view(torch.int64).unflatten(1, (-1, 4)).unbind(-1)  # four int64 are a block of the format
    for eight in others:
        first = first | eight
    nonzero = (first & 0x7F7F7F7F7F7F7F7F).bool()
    return torch.stack([either, either | (nonzero & (scales < 95)).amax()])


def _rows(part: Tensor, width: int) -> Tensor:
    """Room for the rows of a part, with ``width`` bytes of each block."""
    down, across = part.shape[:2]
    return torch.empty(down * ROWS, across * width + _GAP, dtype=torch.uint8, device=part.device)[:, :-_GAP]


def _padded(bytes_: Tensor, part: Tensor, width: int, value: int) -> Tensor:
    """A copy, as ``_rows``, with ``value`` wherever a block goes beyond the edge of the weight."""
    rows = _rows(part, width)
    if rows.shape != bytes_.shape:
        rows.fill_(value)
    rows[: bytes_.shape[0], : bytes_.shape[1]] = bytes_
    return rows


def _store(rows: Tensor, into: Tensor) -> None:
    """The reverse of ``_padded``."""
    into.copy_(rows[: into.shape[0], : into.shape[1]])


def _blocks(length: int, size: int) -> int:
    return -(-length // size)
