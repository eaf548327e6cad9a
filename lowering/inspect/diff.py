"""Two texts of one graph side by side: which lines are the same, rewritten, gone or new."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..text import Line

UNCHANGED, CHANGED, REMOVED, ADDED = "=", "~", "-", "+"


class Row(NamedTuple):
    """Positions of a line in the two graphs, -1 where there is none, and what became of it."""

    sign: str
    before: int
    after: int


def rows(before: Sequence[Line], after: Sequence[Line]) -> Iterator[Row]:
    """The lines of two graphs, aligned.

    Lines that declare the same name, type and weights are one node, rewritten if they differ otherwise. Such keys
    hardly repeat, which keeps the search for long common runs short.
    """
    matcher = difflib.SequenceMatcher(None, list(map(_key, before)), list(map(_key, after)), autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            for left, right in zip(range(i, i_end), range(j, j_end), strict=True):
                same = before[left].text == after[right].text
                yield Row(UNCHANGED if same else CHANGED, left, right)
            continue
        yield from (Row(REMOVED, left, -1) for left in range(i, i_end))
        yield from (Row(ADDED, -1, right) for right in range(j, j_end))


def hunks(aligned: Sequence[Row], context: int) -> Iterator[list[Row]]:
    """Stretches around changes, with that many unchanged rows on either side."""
    hunk: list[Row] = []
    last = None
    for position, row in enumerate(aligned):
        if row.sign == UNCHANGED:
            continue
        if last is None or position - last > 2 * context + 1:
            if last is not None:
                yield hunk + list(aligned[last + 1 : last + 1 + context])
            hunk = list(aligned[max(0, position - context) : position])
        else:
            hunk += aligned[last + 1 : position]
        hunk.append(row)
        last = position
    if last is not None:
        yield hunk + list(aligned[last + 1 : last + 1 + context])


def _key(line: Line) -> tuple[str, tuple[str, ...]]:
    return line.text.partition(" = ")[0], line.weights
