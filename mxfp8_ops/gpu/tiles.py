"""Which part of the result a program computes, and how it stores it: shared by the kernels for Hopper.

A result ``[M, N]`` is computed in tiles. The first ``whole`` tiles are each one program's work; each of the others is
shared by ``parts`` programs, which take turns of K each and store float32 sums that ``mxfp8_add_parts`` adds up, in a
fixed order. So the last tiles, fewer than the chip has room for, keep all of it busy (split-K where ``whole`` is 0).

TMA takes several times as long for a row of x that is not there as for one that is. So the last rows' tile is moved up
to end with the last row: its first rows are then some of the tile before once more, and are not stored. Where x has
fewer rows than a tile, the tile's rows come in two boxes of half as many, of which the second is moved up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .versions import load_box

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
def part_of_tile(blocks, whole, parts):
    """This program's tile, which part of all partial sums it is (-1: none), its first step along K and their number."""
    program = gl.program_id(0)
    rest = program - whole
    if rest < 0:
        tile = program
        part = -1
        first = 0
        steps = blocks
    else:
        tile = whole + rest // parts
        part = rest
        turn = rest % parts
        first = turn * blocks // parts
        steps = (turn + 1) * blocks // parts - first
    return tile, part, first, steps


@gluon.jit
def place_of_tile(tile, M, N, BM: gl.constexpr, BN: gl.constexpr):
    """The first row and column of a tile in the result."""
    down = (M + BM - 1) // BM
    across = (N + BN - 1) // BN
    group = tile // (GROUP * across)
    height = gl.minimum(down - group * GROUP, GROUP)
    within = tile - group * (GROUP * across)
    return (group * GROUP + within % height) * BM, within // height * BN


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
def store_part(total, partial):
    """A float32 tile ``[BN, BM]`` as it is."""
    LAYOUT: gl.constexpr = total.type.layout
    n = gl.arange(0, total.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    m = gl.arange(0, total.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(partial + n * total.shape[1] + m, total)


@gluon.jit
def store_tile(total, bias, out, M, N, row, column, BOX: gl.constexpr, HAS_BIAS: gl.constexpr):
    """A float32 tile ``[BN, BM]`` plus bias, rounded and transposed, to its place in ``out [M, N]``."""
    BN: gl.constexpr = total.shape[0]
    BM: gl.constexpr = total.shape[1]
    DTYPE: gl.constexpr = out.dtype.element_ty
    LAYOUT: gl.constexpr = total.type.layout
    if HAS_BIAS:
        n = column + gl.arange(0, BN, gl.SliceLayout(1, LAYOUT))
        total += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0).to(gl.float32), 1)
    if BM >= 32:  # through shared memory, to store 16 bytes a lane
        WARPS: gl.constexpr = BN // 16
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [WARPS, 1], [1, 0])
        tile = gl.convert_layout(gl.permute(total.to(DTYPE), (1, 0)), ROWS)
        m, stored = rows_of_result(gl.arange(0, BM, gl.SliceLayout(1, ROWS))[:, None], row, M, BOX)
        n = column + gl.arange(0, BN, gl.SliceLayout(0, ROWS))[None, :]
        gl.store(out + m.to(gl.int64) * N + n, tile, mask=stored & (n < N))
    else:
        m, stored = rows_of_result(gl.arange(0, BM, gl.SliceLayout(0, LAYOUT))[None, :], row, M, BOX)
        n = column + gl.arange(0, BN, gl.SliceLayout(1, LAYOUT))[:, None]
        gl.store(out + m.to(gl.int64) * N + n, total.to(DTYPE), mask=stored & (n < N))


@triton.jit(do_not_specialize=["M", "whole", "parts"])
def mxfp8_add_parts(
    partial,
    bias,
    out,
    M,
    N,
    whole,
    parts,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    BOX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Adds up the parts of STEP columns of a tile, ``partial [tile, part, BN, BM]``, and stores them in ``out``."""
    tile = tl.program_id(0) // (BN // STEP)
    first_row, first_column = place_of_tile(whole + tile, M, N, BM, BN)
    n = tl.program_id(0) % (BN // STEP) * STEP + tl.arange(0, STEP)[:, None]
    m = tl.arange(0, BM)[None, :]
    place = partial + tile.to(tl.int64) * parts * (BN * BM) + n * BM + m
    total = tl.zeros((STEP, BM), tl.float32)
    for part in range(parts):
        total += tl.load(place + part * (BN * BM))
    row, stored = rows_of_result(tl.trans(m), first_row, M, BOX)
    column = first_column + tl.trans(n)
    total = tl.trans(total)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < N, other=0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * N + column, total, mask=stored & (column < N))
