"""Sums of parts of tiles, which programs leave in memory for the one that adds them up (split-K and stream-K).

Each program has slots of its own. It stores a float32 tile there and says so; another one waits until all have said so
whose sums it needs, and adds them in a fixed order.

Nobody waits for ever: a program waits for ones with lower numbers only, which have started before it, and which say
that their sums are there before they wait themselves.
"""

from __future__ import annotations

import secrets

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .versions import barrier

STORED = secrets.randbits(62) | 1 << 62
"""What a program writes to say that its sums are there, and who reads it takes away again. The word is not cleared
before, which would take another launch: memory that holds this number of 62 random bits by chance is not to be feared,
and no launch leaves it behind.
"""

STORING = gl.constexpr(2)
"""Blocks of K that take as long as to store sums and to find that they are there, in most kernels."""

_ACQUIRE = gl.constexpr("ld.acquire.gpu.global.b64 $0, [$1];")


@gluon.jit
def part_begins(part, parts, blocks, LONGER: gl.constexpr):
    """The block of K with which one of equal parts of a tile begins. The last part is LONGER by as many blocks as the
    others take to store their sums: who has it waits for them.
    """
    return part * (blocks - LONGER) // parts


def memory(slots: int, size: int, device: torch.device) -> Tensor:
    """Slots for sums of tiles of so many elements, and for what is said of each: int32."""
    return torch.empty(slots * (size + 2), dtype=torch.int32, device=device)


@gluon.jit
def store_sums(sums, partial, slot):
    """Stores a tile of sums (see ``heights``) for another program, which ``say_stored`` tells."""
    place = _slot(partial, slot, sums)
    for i in gl.static_range(len(sums)):
        flat = in_order_of_registers(sums[i])
        gl.store(_items(place, flat), flat.to(gl.int32, bitcast=True))
        place += flat.shape[0]


@gluon.jit
def say_stored(partial, stored, slot, slots, SIZE: gl.constexpr):
    """After a barrier, the later the better: what is still on its way to memory is waited for."""
    gl.atomic_xchg(_words(partial, slots, SIZE) + slot, stored, sem="release", scope="gpu")


@gluon.jit
def add_stored(sums, partial, stored, first, count, slots):
    """Adds to a tile what others store in ``count`` slots from ``first`` on, as soon as all of it is there."""
    words = _words(partial, slots, _size(sums)) + first
    for begin in range(0, count, 32):
        _wait_for(words + begin, stored, gl.minimum(count - begin, 32))
    for n in range(count):
        sums = _added(sums, _slot(partial, first + n, sums))
    return sums


@gluon.jit
def _added(sums, place):
    first = _added_tile(sums[0], place)
    if len(sums) == 1:
        return (first,)
    else:
        return first, _added_tile(sums[1], place + sums[0].shape[0] * sums[0].shape[1])


@gluon.jit
def _added_tile(total, place):
    flat = in_order_of_registers(total)
    flat += gl.load(_items(place, flat), cache_modifier=".cg").to(gl.float32, bitcast=True)
    return as_before(flat, total)


@gluon.jit
def _wait_for(words, stored, count):
    """Until it is said in all of up to 32 words, which every warp looks at at once, a lane at each. Then it is taken
    away.
    """
    LANE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    words += gl.minimum(gl.arange(0, 32, LANE), count - 1)
    missing = 1
    while missing != 0:
        found = gl.inline_asm_elementwise(_ACQUIRE, "=l,l", [words], gl.int64, False, 1)
        missing = gl.max((found != stored).to(gl.int32), 0)
    barrier()
    gl.store(words, gl.full([32], 0, gl.int64, LANE))


@gluon.jit
def _slot(partial, slot, sums):
    """Where the sums of a slot are."""
    return partial + slot.to(gl.int64) * _size(sums)


@gluon.jit
def _items(place, flat):
    return place + gl.arange(0, flat.shape[0], flat.type.layout)


@gluon.jit
def _size(sums):
    """Elements of a tile."""
    if len(sums) == 1:
        return sums[0].shape[0] * sums[0].shape[1]
    else:
        return sums[0].shape[0] * (sums[0].shape[1] + sums[1].shape[1])


@gluon.jit
def _words(partial, slots, SIZE: gl.constexpr):
    """Where it is said of each slot that they are there."""
    return (partial + slots.to(gl.int64) * SIZE).to(gl.pointer_type(gl.int64))


@gluon.jit
def in_order_of_registers(total):
    """A tile ``[BN, BM]`` in the layout of a matrix instruction as one row, or several ``[ALONG, BN, BM]`` as a row
    each: four elements of a lane follow each other, and then those of the next lane.
    """
    SHAPES: gl.constexpr = _shapes(total.shape)
    return gl.reshape(gl.permute(gl.reshape(total, SHAPES[0]), SHAPES[1]), SHAPES[2])


@gluon.constexpr_function
def _shapes(shape):
    """Of the bits of a tile's elements, how they are to follow each other, and of the rows."""
    *several, columns, rows = shape
    order = [*range(len(several)), *(len(several) + bit for bit in (3, 0, 2, 4, 1, 5))]
    return [*several, columns // 16, 2, 8, rows // 8, 4, 2], order, [*several, columns * rows]


@gluon.jit
def as_tile(flat, BN: gl.constexpr, BM: gl.constexpr):
    """The row as a tile again, wherever its elements are now."""
    return gl.reshape(gl.permute(gl.reshape(flat, [BM // 8, BN // 16, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5)), [BN, BM])


@gluon.jit
def as_before(flat, total):
    """The row as a tile again, like ``total``."""
    tile = as_tile(flat, total.shape[0], total.shape[1])
    return gl.convert_layout(tile, total.type.layout, assert_trivial=True)
