"""What stands in one cell of a table, and rows of cells in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from . import bars
from .options import Record, shapes_of


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


def of_shapes(records: Sequence[Record], text: Callable[[Record], str]) -> Iterator[str]:
    """A row for every number of rows of x, with a column for every shape; empty where nothing was measured."""
    shapes = shapes_of(records)
    by_cell = {(record["n"], record["k"], record["m"]): record for record in records}
    yield from head("M", *(f"{n} x {k}" for n, k in shapes))
    for m in sorted({record["m"] for record in records}):
        found = (by_cell.get((*shape, m)) for shape in shapes)
        yield row(str(m), *("" if record is None else text(record) for record in found))


def head(*cells: str) -> Iterator[str]:
    yield row(*cells)
    yield "|" + "---|" * len(cells)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
