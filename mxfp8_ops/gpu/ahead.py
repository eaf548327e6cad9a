"""What ``wide`` loads ahead: the blocks of K of all pieces of a program, one after the other.

Functions here and there take as ``config`` the kernel's constants PACKED, BM, STAGES, BOX and HAS_BIAS, and as
``problem`` what all pieces have in common: M, N, blocks of K, tiles, how many of them are whole, the program's work,
and how many pieces that is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .shares import piece_of
from .tiles import load_rows, place_of_tile
from .versions import load_box


@gluon.jit
def piece(n, problem, BM: gl.constexpr):
    """The n-th piece of this program: the first row and column of its tile, from which block of K on, how many, and
    whether it is FIRST, WHOLE or LAST. Some piece if there are not as many.
    """
    M, N, blocks, tiles, whole, work, _ = problem
    tile, first, count, part = piece_of(n, gl.program_id(0), gl.num_programs(0), whole, blocks, work)
    row, column = place_of_tile(gl.minimum(tile, tiles - 1), M, N, BM, 128)
    return row, column, first, count, part


@gluon.jit
def cursor(n, problem, config: gl.constexpr):
    """What is to be loaded next at the beginning of the n-th piece: that number, how many blocks of it are left, its
    row of x, its place in the weight (PACKED: the row of its block; else the row), and its column of x.
    """
    row, column, first, count, _ = piece(n, problem, config[1])
    place = column
    if config[0]:
        place = (column // 128 * problem[2] + first) * 132
    return n, count, row, place, first * 128


@gluon.jit
def next_block(ahead, problem, config: gl.constexpr):
    """The next block."""
    n, left, row, place, k = ahead
    left -= 1
    place += 132 if config[0] else 0
    k += 128
    if left == 0:
        n, left, row, place, k = cursor(n + 1, problem, config)
    return n, left, row, place, k


@gluon.jit
def next_block_or(ahead, then, PACKED: gl.constexpr):
    """The next block, where it is known what follows this piece: without branches, in the midst of multiplying."""
    n, left, row, place, k = ahead
    ends = left == 1
    n = gl.where(ends, then[0], n)
    left = gl.where(ends, then[1], left - 1)
    row = gl.where(ends, then[2], row)
    place = gl.where(ends, then[3], place + (132 if PACKED else 0))
    k = gl.where(ends, then[4], k + 128)
    return n, left, row, place, k


@gluon.jit
def load(sources, stages, problem, ahead, stage, HALF: gl.constexpr, config: gl.constexpr):
    """Has TMA fill a stage with the half (0 or 1) of a block of K, 64 elements, unless there are no more pieces."""
    x, elements, scales = sources
    x_stages, element_stages, scale_stages, full = stages
    n, _, row, place, k = ahead
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    BOX: gl.constexpr = config[3]
    ready = full.index(stage)
    within = n < problem[6]
    mbarrier.expect(ready, 128 * 64 + 128 * 4 * (PACKED > 0) + BM * 64 * 2, pred=within)
    if PACKED:
        at = [place + HALF * 64, 0]
        load_box(scales, [place + 128, 0], ready, scale_stages.index(stage), pred=within)
    else:
        at = [place, k // 4 + HALF * 16]
    load_box(elements, at, ready, element_stages.index(stage), pred=within)
    load_rows(x, row, problem[0], k + HALF * 64, ready, x_stages.index(stage), BOX, within)
