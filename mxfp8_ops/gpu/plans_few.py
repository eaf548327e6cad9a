"""How the kernels for few rows of x cut up their work, ``row``, ``direct`` and ``narrow``: on packed weights.

A model of their time chooses: see ``costs_few``. The tables were fitted to times of H200s (132 multiprocessors): first
of all so that the model prefers fast kinds.

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
- ``narrow``: with 8, 16 and 32 rows and weights of 28 shapes, from 512x2048 to 28672x8192 and 3584x18944. The model's
  choice took 1.004, 1.006 and 1.002 times as long on average as the fastest of its kinds and of the three plans of
  other kernels that the model prefers, 1.10 at worst; for fifths of the shapes without which it was fitted 1.010, 1.007
  and 1.008, 1.19 at worst.
"""

from __future__ import annotations

from collections.abc import Iterator

from .costs_few import Cost, with_work
from .kinds_few import Direct, Few, Narrow, Row

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
    Narrow(8, 4, 4): Cost(0.8667, 1.8912, 0.2901, 0.1181),
    Narrow(8, 1, 4): Cost(1.333, 0.8165, 0.3239, 0.1119),
    Narrow(16, 4, 4): Cost(1.2529, 1.7878, 0.2775, 0.1257),
    Narrow(16, 1, 4): Cost(0.0002, 2.0576, 0.419, 0.0936),
    Narrow(32, 4, 4): Cost(0.2119, 2.448, 0.4655, 0.1118),
}
"""For 5 to 32."""

COSTS = dict[Few, Cost]([*ROW.items(), *FOUR.items(), *EIGHT.items(), *NARROW.items()])


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
    """The kinds for so many rows, up to eight, and so much of K."""
    return with_work(FOUR if m <= 4 else EIGHT, k)


def narrows(m: int, k: int) -> Iterator[Narrow]:
    """The kinds for so many rows, 5 to 32, where K is cut into whole blocks."""
    rows = 8 if m <= 8 else 16 if m <= 16 else 32
    return (kind for kind in NARROW if kind.rows == rows and 4 < m <= rows and k % 128 == 0)
