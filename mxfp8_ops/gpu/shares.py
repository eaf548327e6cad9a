"""What each program computes where there are no more than the chip has room for, and how they share tiles (stream-K).

The first ``whole`` tiles of a result go round among the programs. The blocks of K of the other tiles stand in a row, of
which every program gets an equal share; so a share may end within a tile, and begin within one. After its rounds, which
all do in step, a program computes the end of its share, the FIRST part of a tile or one in the midst, and stores the
sums; then the whole tiles of its share; then its beginning, the LAST part of a tile, to which it adds, in a fixed
order, what programs before it have stored: long ago as a rule.

How they leave the sums to each other: ``partial_sums``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .partial_sums import STORING, part_begins

FIRST = gl.constexpr(-1)
WHOLE = gl.constexpr(0)
LAST = gl.constexpr(1)

LEAST = gl.constexpr(3)
"""Blocks of a part, at least: others would not be worth storing and adding sums for."""


@gluon.jit
def share_begins(program, programs, shared, blocks):
    """Where the share of a program begins in a row of ``shared`` tiles of ``blocks`` each.

    Where every tile has as many programs, they have equal parts of it, with which they begin at the same time.
    """
    begin = program * (shared * blocks) // programs
    parts = programs // shared
    if (parts > 1) & (parts * shared == programs):
        begin = program // parts * blocks + part_begins(program % parts, parts, blocks, STORING)
    within = begin % blocks
    if within < LEAST:
        begin -= within
    elif within > blocks - LEAST:
        begin += blocks - within
    return begin


@gluon.jit
def work_of(program, programs, tiles, whole, blocks):
    """A program's whole tiles, and where its share begins and ends: tiles of the row, and blocks of the next one."""
    rounds = (whole - program + programs - 1) // programs
    begin = 0
    end = 0
    if tiles > whole:
        begin = share_begins(program, programs, tiles - whole, blocks)
        end = share_begins(program + 1, programs, tiles - whole, blocks)
    return rounds, begin // blocks, begin % blocks, end // blocks, end % blocks


@gluon.jit
def pieces_of(work):
    """How many pieces a program has to do: whole tiles, and all tiles that its share has something of."""
    rounds, begin, _, end, beyond = work
    return rounds + end - begin + gl.minimum(beyond, 1)


@gluon.jit
def piece_of(n, program, programs, whole, blocks, work):
    """The n-th of them: its tile, from which block on and how many, and whether it is FIRST, WHOLE or LAST."""
    rounds, begin, skipped, end, beyond = work
    tile = program + n * programs
    first = 0
    count = blocks
    part = WHOLE
    if n >= rounds:
        later = n - rounds - gl.minimum(beyond, 1)
        tile = begin + later + gl.minimum(skipped, 1)  # the tile in which the share begins comes after the others
        if later < 0:
            tile = end
            first = gl.where(begin == end, skipped, 0)
            count = beyond - first
            part = FIRST
        elif tile >= end:
            tile = begin
            first = skipped
            count = blocks - first
            part = gl.minimum(first, 1)  # LAST, or WHOLE where nothing was skipped
        tile += whole
    return tile, first, count, part


@gluon.jit
def when_to_say(work):
    """After which piece a program says that its sums are stored: after the next one, if there is one. -1: never."""
    rounds, _, _, _, beyond = work
    return gl.where(beyond > 0, gl.minimum(rounds + 1, pieces_of(work) - 1), -1)


@gluon.jit
def first_of_tile(program, programs, shared, blocks, work):
    """The first program that has a part of the tile in which this one's share begins: all up to this one have."""
    _, tile, skipped, _, _ = work
    begin = tile * blocks + skipped
    while begin > tile * blocks:
        program -= 1
        begin = share_begins(program, programs, shared, blocks)
    return program
