"""Which kernel multiplies a weight on Hopper, and how the work is cut up: the plan that a model of its time prefers.

The model counts how many programs there are for a multiprocessor, so it holds for other shapes and other numbers of
multiprocessors. Its tables were fitted to times of H200s (132 multiprocessors), of packed and of canonical weights:
first of all so that it prefers fast plans. ``MXFP8_AUTOTUNE=1`` measures the same plans instead.

- From 9 rows of x on to some 7500 times of 32 shapes, 512x8192 to 8192x28672 and 37888x3584, with 16 to 1024 rows,
  beginning with what had been fitted to some 12000 times of earlier kernels, of 44 shapes up to 151936x2048. Its choice
  took 1.002 times as long as the fastest plan on average, 1.11 at worst; for sixths of the shapes without which it was
  fitted 1.004 times on average, 1.26 at worst.
- Tiles of 48 to 96 rows again, with more kernels to choose from, to 1200 times of 20 shapes, 1024x4096 to 8192x28672,
  most of them with 48 and 64 rows, and of canonical weights nearly all. Of what was measured, its choice took 1.005
  times as long as the fastest plan on average, 1.11 at worst, with 96 rows; with 48 and 64 rows 1.004 and 1.03, where
  it had been 1.049 and 1.21 without those kernels.
- For up to 32 rows and packed weights there are other kernels, too: see ``plans_few``; for up to 16 and canonical ones
  another one: see ``plans_vectors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from . import costs_few, plans_few, plans_vectors
from .counts import divided
from .kinds_few import Direct, Few, Narrow, Vectors
from .plans_few import directs, fewest, narrows, single_rows


@dataclass(frozen=True)
class Skinny:
    """The kernel in ``skinny``: rows of x (one power of two, or the sum of two), consumers along N and along K, stages,
    registers of a consumer's lane and of any lane at the start (0: as many as there are), parts of a tile.
    """

    rows: int
    across: int
    along: int
    stages: int
    consumer_registers: int
    registers: int
    parts: int = 1

    @property
    def columns(self) -> int:
        """Of a tile."""
        return 64 * self.across

    @property
    def constants(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.rows, self.across, self.along, self.stages, self.consumer_registers


@dataclass(frozen=True)
class Wide:
    """The kernel in ``wide``: how many programs there are at most, and how many of the last tiles they all share: in
    equal parts if each of them gets the same number of programs. Rows of x, 256 or 320.
    """

    programs: int
    shared: int = 0
    rows: int = 256

    columns: ClassVar = 128
    """Of a tile."""

    @property
    def stages(self) -> int:
        """As many as there is memory for."""
        return 5 if self.rows == 256 else 4

    @property
    def constants(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.rows, self.stages


Plan: TypeAlias = Direct | Narrow | Vectors | Skinny | Wide
Tiled: TypeAlias = Skinny | Wide


@dataclass(frozen=True)
class Cost:
    """Microseconds that a kernel takes, for weights that are packed and canonical. A multiprocessor runs ``at_once``
    programs at the same time. For each block of 128 elements of K it takes ``turn`` for those, and ``each`` for
    every single one. ``start`` is for loading the first stages and storing the results; where tiles are cut into
    parts ``add`` for waiting until all sums are there, and ``megabyte`` for moving them.
    """

    at_once: int
    turn: tuple[float, ...]
    each: tuple[float, ...]
    start: float
    add: float = 0
    megabyte: float = 0


TABLE: dict[Skinny, Cost] = {
    Skinny(16, 1, 2, 6, 96, 72): Cost(2, (0.0578, 0.0949), (0.1969, 0.2097), 2.574, 0.399, 1.308),
    Skinny(16, 1, 4, 12, 96, 0): Cost(1, (0.0221, 0), (0.1991, 0.258), 3.666, 0.712, 1.132),
    Skinny(16, 2, 2, 8, 96, 0): Cost(1, (0.0059, 0.0015), (0.4536, 0.5276), 2.877, 1.406, 1.063),
    Skinny(32, 1, 2, 4, 104, 80): Cost(2, (0.1343, 0.154), (0.1667, 0.191), 2.529, 0.411, 0.594),
    Skinny(32, 1, 4, 8, 96, 0): Cost(1, (0, 0), (0.2345, 0.2743), 3.336, 0.48, 0.571),
    Skinny(48, 1, 2, 4, 104, 80): Cost(2, (0.1338, 0.1336), (0.1855, 0.2448), 2.457, 0.767, 0.333),
    Skinny(48, 1, 4, 8, 96, 0): Cost(1, (0, 0), (0.2428, 0.2966), 3.677, 0.531, 0.342),
    Skinny(64, 1, 1, 4, 240, 128): Cost(2, (0.266, 0.2306), (0.1513, 0.2591), 1.96, 1.183, 0.214),
    Skinny(64, 1, 2, 4, 104, 80): Cost(2, (0.1339, 0.1078), (0.1908, 0.2594), 2.72, 1.143, 0.204),
    Skinny(64, 1, 2, 6, 168, 0): Cost(1, (0, 0), (0.2601, 0.3536), 3.57, 0.525, 0.102),
    Skinny(64, 1, 4, 8, 96, 0): Cost(1, (0, 0), (0.2699, 0.3159), 2.861, 0.382, 0.389),
    Skinny(64, 2, 2, 6, 96, 0): Cost(1, (0, 0), (0.4903, 0.6004), 2.598, 0.348, 0.362),
    Skinny(80, 1, 1, 3, 240, 128): Cost(2, (0.1849, 0.1137), (0.2212, 0.3186), 2.528, 0.674, 0.2),
    Skinny(80, 1, 2, 6, 168, 0): Cost(1, (0, 0), (0.3425, 0.375), 2.883, 1.114, 0.134),
    Skinny(80, 2, 2, 4, 112, 0): Cost(1, (0, 0), (0.5644, 0.6932), 3.337, 0.391, 0.191),
    Skinny(96, 1, 1, 3, 240, 128): Cost(2, (0.232, 0.2151), (0.2213, 0.2885), 2.117, 0.77, 0.197),
    Skinny(96, 1, 2, 6, 168, 0): Cost(1, (0, 0), (0.3581, 0.4278), 3.231, 0.424, 0.144),
    Skinny(128, 1, 2, 4, 168, 0): Cost(1, (0, 0), (0.4365, 0.4978), 2.367, 0.56, 0.198),
    Skinny(128, 2, 1, 4, 240, 0): Cost(1, (0, 0), (0.7316, 0.8895), 2.492, 0.567, 0.161),
    Skinny(160, 1, 2, 4, 168, 0): Cost(1, (0, 0), (0.4815, 0.5689), 3.173, 0.523, 0.107),
    Skinny(160, 2, 1, 3, 240, 0): Cost(1, (0, 0), (0.8814, 1.1307), 3.1, 1.169, 0.1),
    Skinny(192, 1, 2, 4, 240, 0): Cost(1, (0, 0), (0.5321, 0.6643), 2.816, 0.546, 0.213),
    Skinny(192, 2, 1, 3, 240, 0): Cost(1, (0, 0), (1.0004, 1.3058), 2.508, 1.23, 0.13),
}

PART = 40e-6
"""Microseconds for each element of a tile and every part of it but one, whatever the kernel: who has the last part adds
the others one after the other.
"""


@dataclass(frozen=True)
class WideCost:
    """Microseconds that ``wide`` takes: ``each`` for a block of 128 elements of K, ``tile`` more for each piece of a
    program, ``start`` at the beginning and in the end. Where tiles are shared ``share`` more, and ``add`` whenever sums
    are added; in equal parts, ``part`` for each but one.
    """

    each: float
    tile: float
    start: float
    share: float
    add: float
    part: float


WIDE = {
    256: (WideCost(1.348, 1.704, 1.848, 4.2, 2.018, 3.627), WideCost(1.393, 2.249, 1.87, 3.933, 1.299, 2.933)),
    320: (WideCost(1.845, 5.282, 2.819, 4.993, 1.823, 4.06), WideCost(2.037, 3.728, 1.167, 8.481, 2.157, 3.979)),
}
"""By rows of a tile, for weights that are packed and canonical."""

APART = 1.02
"""How much longer the blocks of a share take that is no equal part of a tile: programs are not in step then, and find
less in the cache.
"""

FULL = 0.85
"""Of the programs: if more have work in the last round, sharing it gains nothing."""

SHARE = 8
"""Blocks of K that a program's share has at least: its parts of tiles may not be too short."""


FEW = dict[Few, costs_few.Cost]([*plans_few.COSTS.items(), *plans_vectors.COSTS.items()])
"""What the kernels for few rows of x cost."""


def plan(m: int, n: int, k: int, processors: int, packed: bool = True) -> Plan:
    """How to multiply ``m`` rows of x by a weight ``[n, k]`` on a chip of as many multiprocessors: the candidate that
    the model finds fastest. Up to four rows of x and a packed weight are left to ``row`` and ``direct``.
    """
    choices = fewest(m, k) if packed and m <= 4 else candidates(m, n, k, processors, packed)
    return min(choices, key=lambda choice: microseconds(choice, m, n, k, processors, packed))


def candidates(m: int, n: int, k: int, processors: int, packed: bool = True) -> Sequence[Plan]:
    """Plans worth measuring."""
    return [*_few(m, k, packed), *_tiled(m, n, k, processors)]


def _few(m: int, k: int, packed: bool) -> Iterator[Plan]:
    """Every kernel for few rows of x."""
    if packed:
        yield from single_rows(m, k)
        if m <= 8:
            yield from directs(m, k)
        yield from narrows(m, k)
    elif m <= plans_vectors.MAX_ROWS:
        yield from plans_vectors.kinds(m, k)


def microseconds(choice: Plan, m: int, n: int, k: int, processors: int, packed: bool) -> float:
    """What a choice will take, by the model."""
    if not isinstance(choice, Skinny | Wide):
        return costs_few.microseconds(choice, FEW[choice], n, k, processors)
    blocks = divided(k, 128)
    tiles = tiles_of(choice, m, n)
    if isinstance(choice, Wide):
        return _wide(choice, tiles, blocks, packed)
    cost = TABLE[_kind(choice)]
    programs = tiles * choice.parts
    time = _programs(cost, programs, blocks / choice.parts, processors, packed)
    if choice.parts > 1:
        size = choice.columns * choice.rows
        megabytes = programs * size * 8e-6  # float32, stored and read
        time += cost.add + cost.megabyte * megabytes + PART * size * (choice.parts - 1)
    return time


def tiles_of(choice: Tiled, m: int, n: int) -> int:
    """How many tiles a result ``[m, n]`` has."""
    return divided(n, choice.columns) * divided(m, choice.rows)


def _wide(choice: Wide, tiles: int, blocks: int, packed: bool) -> float:
    cost = WIDE[choice.rows][int(not packed)]
    rounds = divided(tiles - choice.shared, choice.programs)
    time = cost.start + rounds * (blocks * cost.each + cost.tile)
    if choice.shared:
        share = choice.shared / choice.programs  # of a tile
        parts, rest = divmod(choice.programs, choice.shared)
        if rest == 0:
            time += share * blocks * cost.each + cost.tile + (parts - 1) * cost.part
        else:
            time += share * blocks * cost.each * APART + (1 + share) * cost.tile + cost.share + (parts + 1) * cost.add
    return time


def _programs(cost: Cost, programs: int, blocks: float, processors: int, packed: bool) -> float:
    """As many programs, of as many blocks of K each."""
    each = divided(programs, processors)  # of a multiprocessor
    turns = divided(each, cost.at_once)
    canonical = int(not packed)
    return blocks * (turns * cost.turn[canonical] + each * cost.each[canonical]) + turns * cost.start


def _kind(choice: Skinny) -> Skinny:
    """The choice as it is in the table: without parts, and of 16 rows where it has 8."""
    return replace(choice, rows=max(choice.rows, 16), parts=1)


def _tiled(m: int, n: int, k: int, processors: int) -> Iterator[Tiled]:
    """Every kernel whose tiles have about as many rows, or less but 48, cut into parts where tiles leave processors
    without work.
    """
    rows = max(8, 1 << (m - 1).bit_length())
    blocks = divided(k, 128)
    for kind, cost in TABLE.items():
        if kind.rows != max(rows, 16) and not rows > kind.rows >= 48:
            continue
        kind = replace(kind, rows=min(rows, kind.rows))
        yield kind
        tiles = tiles_of(kind, m, n)
        for parts in (2, 3, 4, 6, 8):
            if tiles * parts <= 2 * cost.at_once * processors and parts * 2 * kind.along <= blocks:
                yield replace(kind, parts=parts)
    for height in WIDE:
        if rows >= height:
            yield from _wides(height, m, n, blocks, processors)


def _wides(rows: int, m: int, n: int, blocks: int, processors: int) -> Iterator[Wide]:
    """Whole tiles alone; and where they leave programs without work in the last round, with so many shared that all
    have as much to do: all tiles if there is less than one for each, else the last ones, more than one for each. Few
    tiles also in as many equal parts as there may be: some processors have no work then, but all others are in step.
    """
    yield Wide(processors, 0, rows)
    tiles = tiles_of(Wide(processors, 0, rows), m, n)
    parts = processors // tiles
    if parts > 1 and SHARE * parts <= blocks:
        yield Wide(tiles * parts, tiles, rows)
    last = tiles % processors
    shared = tiles if tiles < processors else processors + last
    uneven = 0 < last <= FULL * processors and processors % shared > 0
    if uneven and SHARE * processors <= shared * blocks < 2**31 / processors:
        yield Wide(processors, shared, rows)
