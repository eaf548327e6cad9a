"""The tiles of a result ``[M, N]``, and how they are loaded and stored: shared by the kernels for Hopper.

A tile of ``skinny`` is one program's work, or that of ``parts`` programs (split-K), of which each computes a part of K
and the last one adds up all sums. How programs of ``wide`` share tiles: ``shares``.

TMA takes several times as long for a row of x that is not there as for one that is. So the last rows' tile is moved up
to end with the last row: its first rows are then some of the tile before once more, and are not stored. Where x has
fewer rows than a tile, the tile's rows come in two boxes of half as many, of which the second is moved up.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .partial_sums import part_begins
from .versions import load_box

LOADER_REGISTERS = gl.constexpr(24)
"""Of a lane of the warp that only loads."""

TRANSPOSED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""Of shared memory through which a tile goes when it is stored."""

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
def part_of_tile(blocks, parts):
    """This program's tile, which of its parts, that part's first block of K, and how many it has.

    Divisions are left out where they can be, here and below: nothing is loaded before they are done.
    """
    tile = gl.program_id(0)
    part = 0
    first = 0
    count = blocks
    if parts > 1:
        part = tile % parts
        tile = tile // parts
        first = part_begins(part, parts, blocks)
        count = gl.where(part == parts - 1, blocks, part_begins(part + 1, parts, blocks)) - first
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


def box_rows(rows: int, m: int) -> int:
    """Rows of a box of x ``[m, K]``, of a tile of so many ``rows``: half of them at least, and 8, after which the order
    in shared memory repeats.
    """
    return rows if m >= rows else max(rows // 2, 8)


@gluon.jit
def load_rows(x, row, M, k, ready, stage, BOX: gl.constexpr, pred=True):
    """Has TMA fill a stage with the rows of x of a tile that begins with ``row``, and 64 elements of K."""
    BM: gl.constexpr = stage.shape[0]
    for first in gl.static_range(0, BM, BOX):
        at = gl.minimum(row + first, gl.maximum(M - BOX, 0))
        load_box(x, [at, k], ready, stage.slice(first, BOX), pred=pred)


@gluon.jit
def rows_of_result(m, row, M, BOX: gl.constexpr):
    """Which row of the result each row ``m`` of a tile is that begins with ``row``, and whether it is to be stored."""
    first = row + m // BOX * BOX
    moved = gl.minimum(first, gl.maximum(M - BOX, 0)) + m % BOX
    return moved, (moved >= first) & (moved < M)


@gluon.jit
def advance(stage, phase, by: gl.constexpr, STAGES: gl.constexpr):
    """The stage ``by`` stages on, in a ring of STAGES, and the phase of its barrier."""
    stage += by
    wrapped = stage >= STAGES
    return gl.where(wrapped, stage - STAGES, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def store_tile(
    total, bias, out, M, N, row, column, scratch, PIECES: gl.constexpr, BOX: gl.constexpr, HAS_BIAS: gl.constexpr
):
    """A float32 tile ``[BN, BM]`` plus bias, rounded and transposed, to its place in ``out [M, N]``.

    It goes in 1, 2 or 4 pieces of as many rows of x, each through one of ``scratch``, shared memory ``[BM / PIECES,
    BN]``, all of which may be the same; a small tile, of no pieces, as it stands in registers.
    """
    BN: gl.constexpr = total.shape[0]
    BM: gl.constexpr = total.shape[1]
    if HAS_BIAS:
        n = column + gl.arange(0, BN, gl.SliceLayout(1, total.type.layout))
        total += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0).to(gl.float32), 1)
    total = total.to(out.dtype.element_ty)
    if PIECES == 0:
        _store_rows(gl.permute(total, (1, 0)), out, M, N, row, column, 0, BOX)
    else:
        pieces = _pieces(total, PIECES)
        for i in gl.static_range(PIECES):
            scratch[i].store(gl.permute(pieces[i], (1, 0)))
            _store_rows(scratch[i].load(_stored_rows(BN)), out, M, N, row, column, BM // PIECES * i, BOX)


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
