"""How the kernel in ``direct`` cuts up its work: a packed weight, up to eight rows of x.

A model of its time chooses. A multiprocessor runs some programs at once, and begins the next one when one of them ends.
As long as there are many, what they take is what their bytes take; where few are left, or many warps share few blocks
of K, it is how long one program waits for its loads.

The tables were fitted to times of an H200 (132 multiprocessors): first of all so that the model prefers fast kinds. For
up to four rows they are those of weights of 80 shapes, from 512x4096 to 151936x2048. The model's choice took 1.009
times as long as the fastest of 16 kinds on average, 1.07 times at worst; tables that were fitted without a fifth of the
shapes chose kinds for those that took 1.02 times as long. Since then what is left of K after whole turns goes to all
warps: on 12 shapes the same tables choose kinds that take 1.004 times as long, 1.02 at worst. For up to eight rows see
``plans``.
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
    """Microseconds that a kind takes: ``start`` to begin and to end, and ``wave`` whenever the programs of a
    multiprocessor have been replaced by the next ones. For every turn those take ``turn``, which is waiting, or for
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

EIGHT: dict[Direct, Cost] = {
    Direct(8, 1, 16, 2): Cost(0.928, 1.01, 1.746, 0.05533),
    Direct(8, 2, 8, 1): Cost(0.796, 0.96, 1.655, 0.06479),
    Direct(8, 2, 8, 2, 80): Cost(2.284, 1.047, 0.981, 0.09011),
    Direct(8, 2, 4, 1): Cost(0, 1.609, 1.579, 0.05787),
    Direct(8, 2, 4, 2, 80): Cost(2.641, 0.243, 2.176, 0.06997),
}
"""For up to eight."""

COSTS = FOUR | EIGHT


def directs(m: int, k: int) -> list[Direct]:
    """The kinds for so many rows, up to eight, whose warps all have work, or for more than four rows three quarters of
    them: others were not measured. With too few blocks of K, those of which the fewest have none.
    """
    kinds, working = (FOUR, 1.0) if m <= 4 else (EIGHT, 0.75)
    most = max(divided(k, 128) / working, min(kind.together for kind in kinds))
    return [kind for kind in kinds if kind.together <= most]


def microseconds(kind: Direct, n: int, k: int, processors: int) -> float:
    """What a kind will take, by the model."""
    cost = COSTS[kind]
    waves, rest = divmod(kind.programs(n), kind.at_once * processors)
    time = cost.start + waves * _wave(kind, kind.at_once, k)
    return time + _wave(kind, rest / processors, k) if rest else time


def _wave(kind: Direct, programs: float, k: int) -> float:
    """As many programs of a multiprocessor, at the same time."""
    cost = COSTS[kind]
    waiting = divided(k, 128 * kind.together) * cost.turn
    return max(waiting, programs * (k / 128) * cost.each) + cost.wave
