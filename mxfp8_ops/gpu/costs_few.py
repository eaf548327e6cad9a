"""A model of the time that kernels for few rows of x take, by their kind: see ``kinds_few``.

A multiprocessor runs some programs at once, and begins the next one when one of them ends. As long as there are many,
what they take is what their bytes take; where few are left, or many warps share few blocks of K, it is how long one
program waits for its loads; in between a little more than either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from .counts import divided
from .kinds_few import Few

_Kind = TypeVar("_Kind", bound=Few)


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


OVERLAP = 4
"""Exponent of the norm of waiting and reading: infinite, and only the longer of the two would count."""

REST = 0.7
"""Of a turn with more blocks of K than one for each warp: what one with a single block takes."""

WORKING = 0.75
"""Of a program's warps, which have work at least: kinds with fewer were not measured."""


def with_work(kinds: Iterable[_Kind], k: int) -> list[_Kind]:
    """Those three quarters of whose warps have work. With too few blocks of K, those of which the fewest have none."""
    known = list(kinds)
    most = max(divided(k, 128) / WORKING, min(kind.together for kind in known))
    return [kind for kind in known if kind.together <= most]


def microseconds(kind: Few, cost: Cost, n: int, k: int, processors: int) -> float:
    """What a kind of that cost will take, by the model."""
    waves, rest = divmod(kind.programs(n), kind.at_once * processors)
    time = cost.start + waves * _wave(kind, cost, kind.at_once, k)
    return time + _wave(kind, cost, rest / processors, k) if rest else time


def _wave(kind: Few, cost: Cost, programs: float, k: int) -> float:
    """As many programs of a multiprocessor, at the same time."""
    waiting = _turns(kind, k) * cost.turn
    reading = programs * (k / 128) * cost.each
    return float((waiting**OVERLAP + reading**OVERLAP) ** (1 / OVERLAP) + cost.wave)


def _turns(kind: Few, k: int) -> float:
    """Whole turns, and what is left of K after them, of which a warp takes one block at a time."""
    whole, left = divmod(divided(k, 128), kind.together)
    return whole + divided(left, kind.warps) * (1 if kind.blocks == 1 else REST)
