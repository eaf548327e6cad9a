"""The bars of the project: what a time may be at most, as a multiple of R (only reading as many bytes as the quantized
weight has) or of B (``F.linear`` on a weight of x's dtype), and on the CPU of another column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .options import CPU_SHAPES, SHAPES, Record

SMALL = (4096, 4096)
WITHOUT_BARS = (1024, 4096)


@dataclass(frozen=True)
class Bar:
    """``column`` takes at most ``limit`` times R or B for ``first`` to ``last`` rows of x; on the ``SMALL`` shape,
    which does not fill a large chip, at most ``small`` times.
    """

    column: str
    first: int
    last: float
    limit: float
    unit: str
    small: float | None = None

    def limit_for(self, record: Record) -> float | None:
        """None where the bar says nothing."""
        shape = record["n"], record["k"]
        if shape == WITHOUT_BARS or shape not in SHAPES or not self.first <= record["m"] <= self.last:
            return None
        return self.small if self.small is not None and shape == SMALL else self.limit


BARS = (
    Bar("packed", 1, 1, 1.06, "R"),
    Bar("packed", 2, 16, 1.24, "R", small=1.55),
    Bar("packed", 17, 32, 0.64, "B", small=0.80),
    Bar("packed", 33, 64, 0.68, "B", small=0.96),
    Bar("packed", 65, 128, 0.84, "B", small=1.00),
    Bar("packed", 129, math.inf, 1.03, "B"),
    Bar("canonical", 1, 1, 1.06, "R"),
    Bar("canonical", 1, 64, 1.00, "B"),
    Bar("canonical", 65, math.inf, 1.12, "B"),
)

FRACTIONS = {"dequant to bfloat16": 0.92, "dequant to float16": 0.92, "quantize from bfloat16": 0.85}
"""Least fractions of a copy's speed."""

CPU_LEVELS = ("amx_bf16", "avx512_bf16")
"""Whose kernels the bars of the CPU are for, with x in bfloat16."""
CPU_BARS = (
    Bar("canonical", 1, 1, 0.27, "B"),
    Bar("canonical", 1, 1, 1.25, "R"),  # 80 % of the bandwidth
    Bar("canonical", 2, 4, 0.40, "B"),
    Bar("canonical", 5, 16, 0.80, "B"),
    Bar("canonical", 17, 64, 1.00, "B"),
    Bar("canonical", 65, 256, 1.06, "B"),
    Bar("canonical", 257, math.inf, 1.03, "B"),
    Bar("folded", 1, math.inf, 1.02, "B"),
    Bar("compiled", 1, math.inf, 1.02, "canonical"),
    Bar("backend", 1, math.inf, 1.02, "canonical"),
)
CPU_FRACTIONS = dict.fromkeys(("dequant to bfloat16", "dequant alone"), 0.80) | dict.fromkeys(
    ("quantize from bfloat16", "quantize alone"), 1 / 1.5
)

CLIFF = 1.25
"""A number of rows is a cliff where it takes more than this many times as long as a neighbour."""


@dataclass(frozen=True)
class Verdict:
    """A measured cell against its bar; ``unit`` is a column, or "copy" for fractions, which must not be less."""

    column: str
    record: Record
    value: float
    limit: float
    unit: str

    @property
    def missed(self) -> bool:
        return self.value < self.limit if self.unit == "copy" else self.value > self.limit

    def __str__(self) -> str:
        where = f"{self.column}, {self.record['n']}x{self.record['k']}"
        if self.unit == "copy":
            return f"{where}: {fraction(self.value, self.limit)} of a copy, at least {self.limit:.0%}"
        value = ratio(self.value, self.limit)
        return f"{where}, M={self.record['m']}: {value} {self.unit}, at most {self.limit:.2f} {self.unit}"


def verdicts(record: Record) -> Iterator[Verdict]:
    """Of a record of the section ``linear`` or ``elementwise``, one for each bar that it has to meet."""
    if record.get("place") == "cpu":
        yield from _verdicts_on_cpu(record)
        return
    if "fractions" in record:
        if (record["n"], record["k"]) in SHAPES and (record["n"], record["k"]) != WITHOUT_BARS:
            for column, value in record["fractions"].items():
                yield Verdict(column, record, value, FRACTIONS[column], "copy")
        return
    for bar in BARS:
        limit = bar.limit_for(record)
        if limit is not None:
            yield Verdict(bar.column, record, record["ratios"][bar.column][bar.unit], limit, bar.unit)


def _verdicts_on_cpu(record: Record) -> Iterator[Verdict]:
    if (record["n"], record["k"]) not in CPU_SHAPES or record["level"] not in CPU_LEVELS:
        return
    if record["dtype"] != "bfloat16":
        return
    for column, value in record.get("fractions", {}).items():
        if column in CPU_FRACTIONS:
            yield Verdict(column, record, value, CPU_FRACTIONS[column], "copy")
    for bar in CPU_BARS if "ratios" in record else ():
        if bar.column in record["ratios"] and bar.first <= record["m"] <= bar.last:
            yield Verdict(bar.column, record, record["ratios"][bar.column][bar.unit], bar.limit, bar.unit)


def missed(record: Record, column: str, units: Iterable[str] = ("R", "B", "copy")) -> Verdict | None:
    """The first bar of those units that a column misses."""
    return next((v for v in verdicts(record) if v.missed and v.column == column and v.unit in units), None)


def ratio(value: float, limit: float | None = None) -> str:
    """With two digits, or with a third one where it would look as if it met the limit that it misses."""
    text = f"{value:.2f}"
    if limit is not None and value > limit and float(text) <= limit:
        return f"{math.ceil(value * 1000 - 1e-6) / 1000:.3f}"
    return text


def fraction(value: float, limit: float | None = None) -> str:
    text = f"{value:.0%}"
    if limit is not None and value < limit and text == f"{limit:.0%}":
        return f"{math.floor(value * 1000 + 1e-6) / 10:.1f}%"
    return text
