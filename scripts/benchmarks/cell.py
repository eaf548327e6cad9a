"""What stands in one cell of a table, and rows of cells in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from . import bars
from .options import Record


def shape(record: Record) -> str:
    return f"{record['n']}x{record['k']}"


def spaced(record: Record) -> str:
    return f"{record['n']} x {record['k']}"


def us(record: Record, column: str) -> str:
    return f"{record['times'][column]['us']:.2f}"


def spread(record: Record) -> str:
    return f"{max(time['spread'] for time in record['times'].values()):.1f}%"


def fraction(record: Record, column: str) -> str:
    verdict = bars.missed(record, column)
    value = record["fractions"][column]
    return bars.fraction(value) if verdict is None else bars.fraction(value, verdict.limit) + "!"


def ratio(record: Record, column: str, unit: str) -> str:
    verdict = bars.missed(record, column, (unit,))
    value = record["ratios"][column][unit]
    if verdict is None:
        return f"{bars.ratio(value)} {unit}"
    return f"{bars.ratio(value, verdict.limit)} {unit}!"


def table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield from head(*names)
    yield from (row(*cells) for cells in rows)


def head(*cells: str) -> Iterator[str]:
    yield row(*cells)
    yield "|" + "---|" * len(cells)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
