"""How ``vectors`` cuts up its work: linear for two to sixteen rows of x on a weight as it is stored.

A model of its time chooses: see ``costs_few``. The tables were fitted to times of H200s (132 multiprocessors), each one
of 450 MB of weights in turn, with x of bfloat16.

- With 4 and 8 rows of x and weights of 39 shapes, from 256x4096 to 28672x8192. The model's choice took 1.007 (4 rows)
  and 1.006 times (8) as long as the fastest of 12 kinds and of 8 on average, 1.06 and 1.09 times at worst; for fifths
  of the shapes without which it was fitted 1.011 and 1.006.
- With 16 rows and 31 of these shapes, all of whose K is whole turns. On Hopper there is ``skinny`` to choose from, too:
  see ``plans``. Both models' choice took 1.004 times as long as the fastest of both on average, 1.06 at worst, and 0.91
  times as long as the choice of ``skinny`` alone, 0.65 to 1.03.
"""

from __future__ import annotations

import functools

from .costs_few import Cost, microseconds, with_work
from .kinds_few import Vectors

MAX_ROWS = 16
"""Of x."""

FOUR: dict[Vectors, Cost] = {
    Vectors(4, 8, 16, 2): Cost(2.3644, 0.3689, 0.5164, 0.0379),
    Vectors(4, 16, 16, 1): Cost(1.8659, 0.641, 1.0506, 0.0684),
    Vectors(4, 8, 8, 2): Cost(2.1434, 0.014, 0.868, 0.0365),
    Vectors(4, 8, 8, 1, 40): Cost(2.052, 0.0712, 0.7006, 0.0351),
    Vectors(4, 16, 8, 1): Cost(2.1521, 0.0333, 0.9456, 0.0674),
    Vectors(4, 8, 4, 1, 40): Cost(2.4097, 0.0216, 0.6686, 0.0326),
    Vectors(4, 16, 4, 1): Cost(2.4211, 0.0565, 0.8803, 0.0653),
}
"""For two to four rows."""

EIGHT: dict[Vectors, Cost] = {
    Vectors(8, 8, 16, 1): Cost(1.6046, 0.652, 0.806, 0.0422),
    Vectors(8, 16, 16, 1): Cost(1.841, 0.509, 1.0768, 0.0727),
    Vectors(8, 8, 8, 1): Cost(1.6635, 0.4013, 0.7299, 0.0393),
    Vectors(8, 16, 8, 1): Cost(2.151, 0.0274, 0.978, 0.0702),
    Vectors(8, 16, 4, 1): Cost(2.4482, 0.06, 0.9118, 0.0659),
    Vectors(8, 16, 2, 1): Cost(1.9095, 0.199, 0.9701, 0.0652),
}
"""For up to eight."""

SIXTEEN: dict[Vectors, Cost] = {
    Vectors(16, 8, 16, 1, 96): Cost(1.5693, 1.0177, 0.9223, 0.0494),
    Vectors(16, 16, 16, 1, 96): Cost(1.8501, 0.9149, 1.2126, 0.073),
    Vectors(16, 16, 8, 1, 96): Cost(1.8708, 0.519, 1.0722, 0.0781),
    Vectors(16, 16, 4, 1, 96): Cost(2.3075, 0.0746, 0.9675, 0.0775),
}
"""For up to sixteen."""

COSTS = {**FOUR, **EIGHT, **SIXTEEN}


def kinds(m: int, k: int) -> list[Vectors]:
    """Those for so many rows, up to MAX_ROWS, and so much of K."""
    return with_work(FOUR if m <= 4 else EIGHT if m <= 8 else SIXTEEN, k)


@functools.cache
def plan(m: int, n: int, k: int, processors: int) -> Vectors:
    """What the model takes for the fastest on a chip of as many multiprocessors: x ``[m, k]``, a weight ``[n, k]``."""
    return min(kinds(m, k), key=lambda kind: microseconds(kind, COSTS[kind], n, k, processors))
