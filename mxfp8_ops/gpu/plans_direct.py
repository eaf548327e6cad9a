"""How the kernel in ``direct`` cuts up its work: a packed weight, up to eight rows of x.

For up to four rows a model of its time chooses. A multiprocessor runs some programs at once, and begins the next one
when one of them ends. As long as there are many, what they take is what their bytes take; where few are left, or many
warps share few blocks of K, it is how long one program waits for its loads. The table was fitted to the times of an
H200 (132 multiprocessors) for weights of 80 shapes, from 512x4096 to 151936x2048, one and four rows: first of all so
that it prefers fast kinds. Its choice took 1.009 times as long as the fastest of 16 kinds on average, 1.07 times at
worst; tables that were fitted without a fifth of the shapes chose kinds for those that took 1.02 times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

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
class Cost:
    """Microseconds that a kind takes: to begin and to end, ``start``, and the same again, ``wave``, whenever the programs
    of a multiprocessor have been replaced by the next ones. For every turn those take ``turn``, which is waiting, or for
    every block of 128 elements of K ``each`` for each program, which is reading, whichever is more.
    """

    start: float
    wave: float
    turn: float
    each: float


FOUR: dict[Direct, Cost] = {
    Direct(4, 1, 16, 2): Cost(2.305, 0.489, 1.161, 0.03412),
    Direct(4, 2, 16, 2): Cost(0.793, 0.744, 2.721, 0.06513),
    Direct(4, 1, 8, 2): Cost(3.012, 0.077, 0.591, 0.03415),
    Direct(4, 2, 8, 1): Cost(1.368, 0.78, 1.086, 0.06165),
    Direct(4, 2, 8, 2): Cost(2.111, 0.118, 2, 0.06684),
    Direct(4, 2, 4, 2): Cost(0.793, 1.638, 2.016, 0.05899),
    Direct(4, 2, 4, 2, 80): Cost(3.196, 0, 0.882, 0.06469),
    Direct(4, 2, 2, 1): Cost(0.097, 2.701, 0.955, 0.05969),
}
"""For up to four rows."""

EIGHT: tuple[Direct, ...] = (
    Direct(8, 1, 16, 2),
    Direct(8, 2, 8, 2, 80),
    Direct(8, 2, 8, 1),
    Direct(8, 2, 4, 2, 80),
    Direct(8, 2, 4, 1),
)
"""For up to eight, by the outputs that they compute at the same time, and so by how many they are best for. Of 29
shapes on an H200.
"""


def direct(m: int, n: int, k: int, processors: int) -> Direct | None:
    """The fastest kind for up to four rows, by the model, of those whose warps all have work. For more rows the first
    one of which every program starts at once, if there is one.
    """
    if m <= 4:
        blocks = divided(k, 128)
        return min(FOUR, key=lambda kind: (max(kind.together, blocks), microseconds(kind, n, k, processors)))
    return next((kind for kind in EIGHT if kind.programs(n) <= kind.at_once * processors), None)


def directs(m: int) -> tuple[Direct, ...]:
    """All kinds for so many rows, up to eight."""
    return tuple(FOUR) if m <= 4 else EIGHT


def microseconds(kind: Direct, n: int, k: int, processors: int) -> float:
    """What up to four rows will take, by the model."""
    cost = FOUR[kind]
    waves, rest = divmod(kind.programs(n), kind.at_once * processors)
    time = cost.start + waves * _wave(kind, kind.at_once, k)
    return time + _wave(kind, rest / processors, k) if rest else time


def _wave(kind: Direct, programs: float, k: int) -> float:
    """As many programs of a multiprocessor, at the same time."""
    cost = FOUR[kind]
    waiting = divided(k, 128 * kind.together) * cost.turn
    return max(waiting, programs * (k / 128) * cost.each) + cost.wave
