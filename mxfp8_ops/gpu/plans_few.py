"""How the kernels for few rows of x cut up their work, ``row``, ``direct`` and ``narrow``: on packed weights.

A model of their time chooses. A multiprocessor runs some programs at once, and begins the next one when one of them
ends. As long as there are many, what they take is what their bytes take; where few are left, or many warps share few
blocks of K, it is how long one program waits for its loads; in between a little more than either.

The tables were fitted to times of H200s (132 multiprocessors): first of all so that the model prefers fast kinds.

- ``direct``: with 4 and 8 rows of x and weights of 40 shapes, from 256x4096 to 28672x8192, some of them with x of
  float16, too, beginning with what had been fitted to earlier kernels and 89 shapes. Each time was one of 450 MB of
  weights in turn: of 300 MB, the cache still has some when they come again, since loads that are to be evicted first
  make room for each other, and kinds differ in how much. For up to four rows the model's choice took 1.007 times as
  long as the fastest of 16 kinds on average, 1.08 times at worst; for fifths of the shapes without which it was fitted
  1.012 on average. Kinds that need a register more for float16 than there are were left out: with these, float16 takes
  at most 1.03 times as long as bfloat16.
- ``row``: with weights of 35 shapes, from 512x2048 to 28672x8192 and 8192x14336. The model's choice took 1.014 times as
  long as the fastest of eight kinds and what it would choose of ``direct`` on average, 1.05 at worst; and 0.95 times as
  long as the latter (0.83 to 1.04). Up to 4096 elements of K ``direct`` is no choice: it was never faster.
- ``narrow``: with 16 and 32 rows and weights of some 28 shapes, from 1024x4096 to 8192x28672 and 65536x2048. Of all
  plans, those of other kernels, too, the model's choice took 1.004 times as long as the fastest one on average, 1.04 at
  worst with 16 rows, 1.05 with 32; with 8 rows and the shapes of ``direct`` 1.014 and 1.11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from .counts import REGISTERS, divided


@dataclass(frozen=True)
class Direct:
    """The kernel in ``direct``: rows of x (4 or 8), tiles of 8 outputs and warps of a program, blocks of K that a warp
    takes in a turn, registers of a lane.
    """

    rows: int
    tiles: int
    warps: int
    blocks: int
    registers: int = 64

    @property
    def constants(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.rows, self.tiles, self.warps, self.blocks

    @property
    def together(self) -> int:
        """Blocks of K that a program takes in a turn."""
        return self.warps * self.blocks

    def programs(self, n: int) -> int:
        """For so many outputs."""
        return divided(2 * divided(n, 16), self.tiles)

    @property
    def at_once(self) -> int:
        """Programs that a multiprocessor runs at the same time."""
        return REGISTERS // (self.registers * 32 * self.warps)


@dataclass(frozen=True)
class Row(Direct):
    """The kernel in ``row``, for one row of x."""

    @property
    def constants(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.tiles, self.warps, self.blocks

    def memory(self, k: int) -> int:
        """Bytes of shared memory for x that the programs of a multiprocessor take, two for an element of a row whose
        length is a power of two.
        """
        return self.at_once * (2 << (k - 1).bit_length())


@dataclass(frozen=True)
class Narrow:
    """The kernel in ``narrow``: rows of x (8, 16 or 32), warps of a program, stages."""

    rows: int
    warps: int
    stages: int

    blocks: ClassVar = 1
    """Of K, that a warp takes in a turn."""

    @property
    def together(self) -> int:
        """Blocks of K that a program takes in a turn."""
        return self.warps

    @property
    def box(self) -> int:
        """Rows of x in a copy: half of them, so that all are there even if x has just more than half, but not less than
        8, after which the order in shared memory repeats. A single warp has no time for a second copy.
        """
        return self.rows if self.warps == 1 else max(self.rows // 2, 8)

    def programs(self, n: int) -> int:
        """For so many outputs."""
        return divided(n, 32)

    @property
    def at_once(self) -> int:
        """Programs that a multiprocessor runs at the same time: of several warps one, which have all registers then;
        else as many as it has memory for.
        """
        return 1 if self.warps > 1 else 8 if self.rows == 8 else 6


Few: TypeAlias = Direct | Narrow


@dataclass(frozen=True)
class Cost:
    """Microseconds that a kind takes: ``start`` to begin and to end, and ``wave`` whenever the programs of a
    multiprocessor have been replaced by the next ones. For every turn those take ``turn``, which is waiting, or for
    every block of 128 elements of K ``each`` for each program, which is reading: the norm of the two, ``OVERLAP``.
    """

    start: float
    wave: float
    turn: float
    each: float


ROW: dict[Row, Cost] = {
    Row(1, 1, 16, 2, 64): Cost(2.2532, 0.2019, 0.3321, 0.0312),
    Row(1, 1, 16, 1, 56): Cost(2.1207, 0.1485, 0.4927, 0.0316),
    Row(1, 2, 16, 1, 64): Cost(1.9822, 0.6565, 0.7157, 0.06),
    Row(1, 1, 8, 2, 56): Cost(2.043, 0.0329, 0.5927, 0.0318),
    Row(1, 1, 4, 2, 56): Cost(2.0757, 0.03, 0.4934, 0.0323),
}
"""For one row, where K is cut into whole turns."""

ROW_K = 16384
"""The longest row for which ``row`` was measured, all of whose turns are written out."""

ROW_ALONE = 4096
"""Up to so many elements of K ``row`` was the fastest for all weights."""

ROW_BYTES = 160 * 1024
"""Of the shared memory of a multiprocessor, which has 227 KiB, that rows of x may take: one for each program."""

FOUR: dict[Direct, Cost] = {
    Direct(4, 1, 16, 2): Cost(3.1318, 0.0645, 1.1725, 0.0395),
    Direct(4, 2, 16, 1): Cost(2.7265, 0.6244, 0.971, 0.0645),
    Direct(4, 2, 16, 1, 80): Cost(2.5468, 0.7339, 0.887, 0.0603),
    Direct(4, 1, 8, 2): Cost(3.2093, 0.1463, 0.7019, 0.0341),
    Direct(4, 2, 8, 1): Cost(2.1011, 1.0002, 0.9126, 0.0612),
    Direct(4, 2, 8, 2, 80): Cost(3.546, 0.078, 0.8819, 0.0621),
    Direct(4, 1, 4, 2): Cost(3.0616, 0.0693, 0.8048, 0.0332),
    Direct(4, 2, 4, 2): Cost(2.5688, 0.265, 1.521, 0.0612),
    Direct(4, 2, 2, 1): Cost(1.4799, 2.065, 0.695, 0.0588),
}
"""For up to four rows. ``start`` is 0.9 more than was fitted, which matters to none but ``row``: with one row of x
and more than 4096 elements of K, the faster one of both is chosen then.
"""

EIGHT: dict[Direct, Cost] = {
    Direct(8, 1, 16, 2, 80): Cost(2.0024, 0.061, 1.8634, 0.0582),
    Direct(8, 2, 16, 1, 80): Cost(1.3562, 1.1113, 1.1404, 0.0826),
    Direct(8, 1, 8, 1): Cost(1.0844, 1.2208, 0.7662, 0.0487),
    Direct(8, 1, 8, 2, 72): Cost(2.2007, 0.0595, 1.0489, 0.058),
    Direct(8, 2, 4, 2, 72): Cost(0.0572, 2.6121, 1.9608, 0.0612),
}
"""For up to eight."""

NARROW: dict[Narrow, Cost] = {
    Narrow(8, 4, 4): Cost(1.3976, 1.5401, 0.3161, 0.118),
    Narrow(8, 1, 4): Cost(2.0483, 0.8445, 0.3168, 0.1247),
    Narrow(16, 4, 4): Cost(1.6079, 1.6311, 0.3633, 0.1193),
    Narrow(16, 1, 4): Cost(2.9747, 0.3985, 0.418, 0.1355),
    Narrow(32, 4, 4): Cost(1.5033, 1.9182, 0.4913, 0.1183),
}
"""For 5 to 32."""

COSTS = dict[Few, Cost]([*ROW.items(), *FOUR.items(), *EIGHT.items(), *NARROW.items()])

OVERLAP = 4
"""Exponent of the norm of waiting and reading: infinite, and only the longer of the two would count."""

REST = 0.7
"""Of a turn with more blocks of K than one for each warp: what one with a single block takes."""

WORKING = 0.75
"""Of a program's warps, which have work at least: kinds with fewer were not measured."""


def single_rows(m: int, k: int) -> list[Row]:
    """The kinds of ``row`` for a problem: none, if there is more than a row, or it is long."""
    if m > 1 or k > ROW_K:
        return []
    return [kind for kind in ROW if k % (128 * kind.together) == 0 and kind.memory(k) <= ROW_BYTES]


def fewest(m: int, k: int) -> list[Direct]:
    """The kinds of both to choose from for so many rows, up to four."""
    found: list[Direct] = [*single_rows(m, k)]
    return found if found and k <= ROW_ALONE else [*found, *directs(m, k)]


def directs(m: int, k: int) -> list[Direct]:
    """The kinds for so many rows, up to eight, three quarters of whose warps have work. With too few blocks of K, those
    of which the fewest have none.
    """
    kinds = FOUR if m <= 4 else EIGHT
    most = max(divided(k, 128) / WORKING, min(kind.together for kind in kinds))
    return [kind for kind in kinds if kind.together <= most]


def narrows(m: int, k: int) -> Iterator[Narrow]:
    """The kinds for so many rows, 5 to 32, where K is cut into whole blocks."""
    rows = 8 if m <= 8 else 16 if m <= 16 else 32
    return (kind for kind in NARROW if kind.rows == rows and 4 < m <= rows and k % 128 == 0)


def microseconds(kind: Few, n: int, k: int, processors: int) -> float:
    """What a kind will take, by the model."""
    cost = COSTS[kind]
    waves, rest = divmod(kind.programs(n), kind.at_once * processors)
    time = cost.start + waves * _wave(kind, kind.at_once, k)
    return time + _wave(kind, rest / processors, k) if rest else time


def _wave(kind: Few, programs: float, k: int) -> float:
    """As many programs of a multiprocessor, at the same time."""
    cost = COSTS[kind]
    waiting = _turns(kind, k) * cost.turn
    reading = programs * (k / 128) * cost.each
    return float((waiting**OVERLAP + reading**OVERLAP) ** (1 / OVERLAP) + cost.wave)


def _turns(kind: Few, k: int) -> float:
    """Whole turns, and what is left of K after them, of which a warp takes one block at a time."""
    whole, left = divmod(divided(k, 128), kind.together)
    return whole + divided(left, kind.warps) * (1 if kind.blocks == 1 else REST)
