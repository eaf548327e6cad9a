"""Reports in a terminal: tables, the graphs as a diff, and the other stages as text. Without colour they read
the same, and in a pipe no line is cut or wrapped.
"""

from __future__ import annotations

import itertools
import os
import pydoc
import shlex
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ..report import AFTER, BEFORE, GraphReport
from ..weights import FOLDED, KEPT, UNMATCHED, WeightReport
from . import diff
from .summary import Report

STYLES = {FOLDED: "green", KEPT: "cyan", UNMATCHED: "bold yellow"}
DIFF_STYLES = {"-": "red", "+": "green", "@": "cyan"}
DYNAMO, CODE = "dynamo", "code"
WIDE = 10_000


def console(**options: Any) -> Console:
    """A console that wraps lines on a terminal only."""
    made = Console(highlight=False, **options)
    if not made.is_terminal:
        made.width = WIDE
    return made


def render(
    reports: Sequence[Report],
    on: Console,
    stages: Sequence[str] = (DYNAMO,),
    context: int = 3,
    notes: Sequence[str] = (),
) -> str:
    """The reports as text for that console.

    Args:
        reports: several are compared first.
        on: whose width and colours count.
        stages: which graphs to print after the tables: "dynamo" (the diff), "aot", "joint", "post-grad", "code".
        context: unchanged lines around a change of the diff.
        notes: on the target, a line each.
    """
    with on.capture() as captured:
        on.print(f"torch {torch.__version__}, compiled without caches: every graph is generated anew", style="dim")
        for note in notes:
            on.print(note, style="dim", markup=False, soft_wrap=True)
        if len(reports) > 1:
            _comparison(reports, on)
        for report in reports:
            _run(report, on)
            for number, graph in enumerate(report.graphs, start=1):
                _stages(report, graph, f"graph {number} of {len(report.graphs)}", on, stages, context)
    if on.is_terminal:
        return captured.get()
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def show(text: str, on: Console, pager: bool = True) -> None:
    """Writes rendered text, through the user's pager where it is longer than the terminal."""
    words = shlex.split(os.environ.get("PAGER", ""))
    pager = pager and (not words or shutil.which(words[0]) is not None)
    if pager and on.is_terminal and on.height < text.count("\n"):
        os.environ.setdefault("LESS", "-RS")
        pydoc.pager(text)
    else:
        on.file.write(text)
        on.file.flush()


# --- tables ---------------------------------------------------------------------------------------------------


def _run(report: Report, on: Console) -> None:
    _heading(f"{report.title}: {report.label}", on)
    if report.weights:
        table = _weights(report.weights)
        if Measurement.get(on, on.options.update(width=WIDE), table).maximum <= on.width:
            on.print(table)
        else:
            _stacked(report.weights, on)
        memory = report.memory
        on.print(
            f"memory of the weights: {memory.before:,} bytes before, {memory.peak:,} at most, {memory.after:,} after"
        )
    if report.plain:
        size = sum(each.nbytes for each in report.plain)
        names = ", ".join(f"{each.name} ({each.dtype})" for each in report.plain)
        on.print(
            f"not MXFP8: {_count(len(report.plain), 'linear')}, {size:,} bytes: {names}", markup=False, soft_wrap=True
        )
    for number, graph in enumerate(report.graphs, start=1):
        if graph.graph_break is not None:
            of = f"graph {number} of {len(report.graphs)} ends at a graph break"
            _warn(f"{of}: {graph.graph_break}", graph.graph_break.explanation, on)
    for each in report.breaks:
        _warn(f"graph break: {each}", each.explanation, on)
    for note in report.notes:
        on.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    if report.compile_seconds:
        share = report.pass_seconds / report.compile_seconds
        on.print(f"passes: {report.pass_seconds:.3f} s of {report.compile_seconds:.2f} s to compile ({share:.1%})")


def _weights(weights: Sequence[WeightReport]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, show_footer=True)
    total = (_count(len(weights), "weight"), sum(w.bytes_before for w in weights), sum(w.bytes_after for w in weights))
    table.add_column("weight", f"total: {total[0]}", overflow="fold")
    for title in ("shape", "action"):
        table.add_column(title, no_wrap=True)
    for title, size in (("bytes before", total[1]), ("bytes after", total[2])):
        table.add_column(title, f"{size:,}", justify="right", no_wrap=True)
    for title in ("kernel", "reason"):
        table.add_column(title, overflow="fold")
    for row in weights:
        sizes = (f"{row.bytes_before:,}", f"{row.bytes_after:,}")
        shape, action = "x".join(map(str, row.shape)), Text(row.action, STYLES[row.action])
        table.add_row(Text(row.name), shape, action, *sizes, Text(row.kernel), Text(row.reason))
    return table


def _stacked(weights: Sequence[WeightReport], on: Console) -> None:
    """Two lines a weight, where the terminal is too narrow for a table."""
    for row in weights:
        shape, size = "x".join(map(str, row.shape)), f"{row.bytes_before:,} -> {row.bytes_after:,} bytes"
        on.print(Text(row.name, "bold"), soft_wrap=True)
        on.print(
            "  ", Text(row.action, STYLES[row.action]), f" {shape}, {size}, ", Text(row.kernel), sep="", soft_wrap=True
        )
        on.print("  ", Text(row.reason), sep="", soft_wrap=True)


def _comparison(reports: Sequence[Report], on: Console) -> None:
    _heading(f"{reports[0].title}: side by side", on)
    table = Table(box=box.SIMPLE, pad_edge=False, show_footer=True)
    table.add_column("weight", "total", overflow="fold")
    runs = []
    for report in reports:
        rows = {row.name: row for row in report.weights}
        runs.append(rows)
        title = report.label
        table.add_column(title, ", ".join(f"{n} {action}" for action, n in report.counts.items() if n), no_wrap=True)
        table.add_column("bytes after", f"{report.memory.after:,}", justify="right", no_wrap=True)
    for name in dict.fromkeys(name for rows in runs for name in rows):
        cells: list[str | Text] = []
        for rows in runs:
            row = rows.get(name)
            cells += [Text(row.action, STYLES[row.action]), f"{row.bytes_after:,}"] if row else ["-", ""]
        table.add_row(Text(name), *cells)
    on.print(table)


# --- graphs ---------------------------------------------------------------------------------------------------


def _stages(report: Report, graph: GraphReport, title: str, on: Console, stages: Sequence[str], context: int) -> None:
    for stage in stages:
        if stage == DYNAMO:
            _heading(f"{title}, {report.label}: before and after", on)
            lines = list(unified(graph, context, bool(report.weights_glob)))
            _print_diff(lines, on, "these weights" if report.weights_glob else "the graph")
        elif stage == CODE:
            for code in graph.code:
                _heading(f"{title}, {report.label}: generated code", on)
                on.print(
                    Syntax("", "python").highlight(code.text) if on.is_terminal else Text(code.text), soft_wrap=True
                )
        else:
            for text in graph.stages.get(stage, ()):
                _heading(f"{title}, {report.label}: {stage}", on)
                on.print(Text("\n".join(map(str, text))), soft_wrap=True)


def unified(graph: GraphReport, context: int, only_linked: bool = False) -> Iterator[str]:
    """Dynamo's graph before and after the lowering as a unified diff.

    Args:
        graph: whose stages are compared.
        context: unchanged lines around a change.
        only_linked: leave out changed lines that have to do with no weight.
    """
    before, after = graph.lines(BEFORE), graph.lines(AFTER)

    def is_shown(row: diff.Row) -> bool:
        line = before[row.before] if row.before >= 0 else after[row.after]
        return not only_linked or row.sign == diff.UNCHANGED or bool(line.weights)

    for hunk in diff.hunks(list(filter(is_shown, diff.rows(before, after))), context):
        old = [row.before for row in hunk if row.before >= 0]
        new = [row.after for row in hunk if row.after >= 0]
        yield f"@@ -{_range(old)} +{_range(new)} @@"
        for unchanged, rows in itertools.groupby(hunk, lambda row: row.sign == diff.UNCHANGED):
            part = list(rows)
            if unchanged:
                yield from (f" {before[row.before]}" for row in part)
            else:
                yield from (f"-{before[row.before]}" for row in part if row.before >= 0)
                yield from (f"+{after[row.after]}" for row in part if row.after >= 0)


def _range(positions: Sequence[int]) -> str:
    return f"{positions[0] + 1 if positions else 0},{len(positions)}"


def _print_diff(lines: Sequence[str], on: Console, what: str) -> None:
    if not lines:
        on.print(f"(nothing changed in {what})")
    text = Text()
    for line in lines:
        text.append(f"{line}\n", DIFF_STYLES.get(line[0], ""))
    on.print(text, soft_wrap=True, end="")


def _heading(text: str, on: Console) -> None:
    on.print(Text(f"\n== {text}", "bold"), soft_wrap=True)


def _warn(text: str, explanation: str, on: Console) -> None:
    on.print(Text(text, "yellow"), soft_wrap=True)
    if explanation:
        on.print(Text(f"  {explanation}"), soft_wrap=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
