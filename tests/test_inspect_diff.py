"""Two texts of a graph side by side."""

from __future__ import annotations

import re

import pytest
from pages import made_up

from lowering.inspect import diff, terminal
from lowering.text import Line


def test_diff_has_every_line_of_both_sides_once() -> None:
    graph = made_up(50).graphs[0]
    before, after = graph.lines("before"), graph.lines("after")
    found = list(diff.rows(before, after))
    assert [left for _, left, _ in found if left >= 0] == list(range(len(before)))
    assert [right for _, _, right in found if right >= 0] == list(range(len(after)))
    changed = [before[left].weights for sign, left, _ in found if sign == diff.CHANGED]
    assert changed == [(weight.name,) for weight in graph.weights if weight.action == "folded"]
    assert {sign for sign, _, _ in diff.rows(before, before)} == {diff.UNCHANGED}


def test_diff_does_not_pair_nodes_of_different_weights() -> None:
    def line(weight: str) -> Line:
        return Line(f"dequant: bf16[64, 64] = mxfp8.dequant({weight})", "dequant", (weight,))

    assert list(diff.rows([line("a")], [line("b")])) == [(diff.REMOVED, 0, -1), (diff.ADDED, -1, 0)]


@pytest.mark.parametrize("context", [0, 1, 3, 100])
@pytest.mark.parametrize("changes", [(), (0,), (19,), (4, 5), (3, 10), (2, 6, 7, 16), tuple(range(20))])
def test_hunks_hold_every_change_once_with_its_context(changes: tuple[int, ...], context: int) -> None:
    aligned = [diff.Row(diff.CHANGED if i in changes else diff.UNCHANGED, i, i) for i in range(20)]
    hunks = list(diff.hunks(aligned, context))
    shown = [row.before for hunk in hunks for row in hunk]
    near = [i for i in range(20) if any(abs(i - change) <= context for change in changes)]
    assert set(near) <= set(shown)
    assert shown == sorted(set(shown))
    for hunk in hunks:
        positions = [row.before for row in hunk]
        assert positions == list(range(positions[0], positions[-1] + 1))
        assert any(row.sign == diff.CHANGED for row in hunk)
    assert len(shown) <= len(near) + len(hunks)  # one row between two hunks is shown rather than announced


def test_unified_diff_is_one_that_patch_would_take() -> None:
    report = made_up(6)
    text = list(terminal.unified(report.graphs[0], 0))
    headers = [re.fullmatch(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", line) for line in text if line.startswith("@@")]
    counted = [(sum(int(h[k]) for h in headers if h)) for k in (1, 2)]
    assert counted == [sum(line.startswith(sign) for line in text) for sign in "-+"]
