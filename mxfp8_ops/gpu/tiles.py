"""The tiles of a result ``[M, N]``, and how they are loaded and stored: shared by the kernels for Hopper.

A tile of ``skinny`` is one program's work, or that of ``parts`` programs (split-K), of which each computes a part of K
and the last one adds up all sums. How programs of ``wide`` share tiles: ``shares``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .heights import rows_of_result
from .partial_sums import part_begins

LOADER_REGISTERS = gl.constexpr(24)
"""Of a lane of the warp that only loads."""

FEW = gl.constexpr(32)
"""Rows of x from which on a tile goes through shared memory when it is stored."""

GROUP = gl.constexpr(4)
"""Tiles along M that follow each other: as many find the same rows of the weight in the cache."""


@gluon.jit
def wait_for_kernel_before():
    """Where kernels are launched as dependent ones (CUDA's programmatic dependent launch), this one may have started
    while the one before it was running, whose results are there from here on; and the next may start now. It waits here
    as well, so that what ran before this kernel has ended, too: whoever wrote a weight, it is read as written.

    Nothing happens where they are not.
    """
    gdc_wait()
    gdc_launch_dependents()


@gluon.jit
def part_of_tile(blocks, parts, LONGER: gl.constexpr):
    """This program's tile, which of its parts (see ``part_begins``), that part's first block of K, and how many it has.

    Divisions are left out where they can be, here and below: nothing is loaded before they are done.
    """
    tile = gl.program_id(0)
    part = 0
    first = 0
    count = blocks
    if parts > 1:
        part = tile % parts
        tile = tile // parts
        first = part_begins(part, parts, blocks, LONGER)
        count = gl.where(part == parts - 1, blocks, part_begins(part + 1, parts, blocks, LONGER)) - first
    return tile, part, first, count


@gluon.jit
def place_of_tile(tile, M, N, BM: gl.constexpr, BN: gl.constexpr):
    """The first row and column of a tile in the result."""
    down = (M + BM - 1) // BM
    group = 0
    if down > GROUP:
        across = (N + BN - 1) // BN
        group = tile // (GROUP * across)
        tile -= group * (GROUP * across)
    first = group * GROUP
    height = gl.minimum(down - first, GROUP)
    column = _divided_by_few(tile, height)
    return (first + tile - column * height) * BM, column * BN


@gluon.jit
def _divided_by_few(number, few):
    """A number below 2**31 divided by 1, 2, 3 or 4."""
    return gl.where(few == 3, gl.umulhi(number, (2**32 + 2) // 3), number >> (few >> 1))


@gluon.jit
def advance(stage, phase, by: gl.constexpr, STAGES: gl.constexpr):
    """The stage ``by`` stages on, in a ring of STAGES, and the phase of its barrier."""
    stage += by
    wrapped = stage >= STAGES
    return gl.where(wrapped, stage - STAGES, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def store_tile(sums, bias, out, M, N, row, column, scratch, BOX: gl.constexpr, HAS_BIAS: gl.constexpr):
    """A tile of sums (see ``heights``) plus bias, rounded and transposed, to its place in ``out [M, N]``.

    It goes through ``scratch``, for each of the sums shared memory ``[rows, BN]``, in pieces of as many rows; what has
    less than FEW rows, as it stands in registers.
    """
    for i in gl.static_range(len(sums)):
        total = _rounded(sums[i], bias, column, N, out.dtype.element_ty, HAS_BIAS)
        _store(total, out, M, N, row + i * sums[0].shape[1], column, scratch[i], BOX if i == 0 else sums[i].shape[1])


@gluon.jit
def _rounded(total, bias, column, N, DTYPE: gl.constexpr, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        n = column + gl.arange(0, total.shape[0], gl.SliceLayout(1, total.type.layout))
        total += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0).to(gl.float32), 1)
    return total.to(DTYPE)


@gluon.jit
def _store(total, out, M, N, row, column, scratch, BOX: gl.constexpr):
    BN: gl.constexpr = total.shape[0]
    BM: gl.constexpr = total.shape[1]
    if BM < FEW:
        _store_rows(gl.permute(total, (1, 0)), out, M, N, row, column, 0, BOX)
    else:
        ROWS: gl.constexpr = scratch.shape[0]
        pieces = _pieces(total, BM // ROWS)
        for i in gl.static_range(len(pieces)):
            scratch.store(gl.permute(pieces[i], (1, 0)))
            _store_rows(scratch.load(_stored_rows(BN)), out, M, N, row, column, ROWS * i, BOX)


@gluon.jit
def _pieces(tile, COUNT: gl.constexpr):
    """A tile ``[BN, BM]`` as COUNT tiles ``[BN, BM / COUNT]``."""
    BN: gl.constexpr = tile.shape[0]
    BM: gl.constexpr = tile.shape[1]
    if COUNT == 1:
        return (tile,)
    else:
        one, other = gl.split(gl.permute(gl.reshape(tile, [BN, 2, BM // 2]), (0, 2, 1)))
        return _pieces(one, COUNT // 2) + _pieces(other, COUNT // 2)


@gluon.constexpr_function
def _stored_rows(columns):
    """A layout in which a lane has 16 bytes of a row."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [columns // 16, 1], [1, 0])


@gluon.jit
def _store_rows(rows, out, M, N, row, column, FIRST: gl.constexpr, BOX: gl.constexpr):
    """Rows of a tile ``[BM, BN]``, from its row FIRST on, to their places."""
    LAYOUT: gl.constexpr = rows.type.layout
    m = FIRST + gl.arange(0, rows.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    m, stored = rows_of_result(m, row, M, BOX)
    n = column + gl.arange(0, rows.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(out + m.to(gl.int64) * N + n, rows, mask=stored & (n < N))
