"""Reports as HTML: one self-contained page, and a fragment for notebooks. The template, the style and the scripts
are in ``page/`` beside this file.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..report import AFTER, BEFORE, GraphReport
from ..text import Line
from ..weights import ACTIONS
from . import diff
from .document import document
from .summary import Report

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "table.js", "graph.js", "details.js", "search.js", "main.js")


def page(reports: Sequence[Report]) -> str:
    """Several reports on one model as one file, which loads nothing from elsewhere."""
    contents = document(reports)
    runs = [_run(report, run) for report, run in zip(reports, contents["runs"], strict=True)]
    labels = _labels(reports)
    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            title=contents["title"],
            versions=contents["versions"],
            runs=runs,
            labels=labels,
            memory_scale=max([1, *(bar.total for run in runs for bar in run["bars"])]),
            comparison=_comparison(reports) if len(reports) > 1 else [],
            actions=ACTIONS,
            style=_text("style.css"),
            scripts=[_text(name) for name in SCRIPTS],
            data=_json([_data(report, run) for report, run in zip(reports, contents["runs"], strict=True)]),
        )
    )


def fragment(report: Report) -> str:
    """One report for a notebook: no script, and styles that suit a light and a dark one."""
    run = _run(report, document([report])["runs"][0])
    return _templates().get_template("fragment.html.j2").render(title=report.title, run=run, actions=ACTIONS)


@functools.cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["size"] = size
    return made


def _text(name: str) -> Markup:
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def size(count: int) -> str:
    """``16.5 MiB`` for a number of bytes, halves rounded up as ``size`` in dom.js does."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    digits = {"B": 0, "GiB": 2}.get(unit, 1)
    return f"{math.floor(amount * 10**digits + 0.5) / 10**digits:.{digits}f} {unit}"


# --- what the template shows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """Bytes of all linears at one time: of MXFP8 weights and scales, of dequantized copies, of plain linears."""

    title: str
    quantized: int
    dequantized: int
    plain: int

    @property
    def total(self) -> int:
        """Bytes of the whole bar."""
        return self.quantized + self.dequantized + self.plain

    @property
    def segments(self) -> list[tuple[str, str, int]]:
        """Class, words and bytes of each part."""
        return [
            ("quantized", "MXFP8 weights and scales", self.quantized),
            ("dequantized", "dequantized copies", self.dequantized),
            ("plain", "linears that are not MXFP8", self.plain),
        ]

    def __str__(self) -> str:
        parts = ", ".join(f"{words} {size(count)}" for _, words, count in self.segments)
        return f"Memory {self.title}: {size(self.total)}; {parts}"


def _bars(report: Report) -> list[Bar]:
    memory, plain = report.memory, sum(each.nbytes for each in report.plain)
    copies = sum(weight.bytes_dequantized for weight in report.weights)
    at_peak = min(memory.before, memory.peak)
    return [
        Bar("before", memory.before, 0, plain),
        Bar("peak during fold", at_peak, memory.peak - at_peak, plain),
        Bar("after", max(0, memory.after - copies), copies, plain),
    ]


def _run(report: Report, run: dict[str, Any]) -> dict[str, Any]:
    breaks = [(f"graph {n}", graph.graph_break) for n, graph in enumerate(report.graphs, 1) if graph.graph_break]
    breaks += [("", each) for each in report.breaks]
    total = ", ".join(f"{count} {action}" for action, count in report.counts.items() if count)
    return {**run, "bars": _bars(report), "breaks": breaks, "times": _times(report), "total": total}


def _times(report: Report) -> str:
    if not report.compile_seconds:
        return f"{report.seconds:.2f} s in all"
    share = report.pass_seconds / report.compile_seconds
    passes = f"passes {report.pass_seconds:.3f} s of {report.compile_seconds:.2f} s ({100 * share:.1f} %)"
    return f"{passes}, {report.seconds:.2f} s in all" if report.seconds else passes


def _labels(reports: Sequence[Report]) -> list[str]:
    """A name for each run, after what sets it apart."""
    labels = [report.label for report in reports]
    return [
        f"{label} ({labels[:position].count(label) + 1})" if labels.count(label) > 1 else label
        for position, label in enumerate(labels)
    ]


def _comparison(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One line for each weight of any run: what it came to in each."""
    runs = [{weight.name: weight for weight in report.weights} for report in reports]
    names = dict.fromkeys(name for run in runs for name in run)
    rows = []
    for name in names:
        cells = [run.get(name) for run in runs]
        results = {(cell.action, cell.bytes_after) if cell else None for cell in cells}
        rows.append({"name": name, "cells": cells, "differs": len(results) > 1})
    return rows


# --- what the scripts read -----------------------------------------------------------------------------------


def _json(value: Any) -> Markup:
    """JSON that may stand in a script element, whatever the names in it."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _data(report: Report, run: dict[str, Any]) -> dict[str, Any]:
    graphs = [_graph(graph, each["kernels"]) for graph, each in zip(report.graphs, run["graphs"], strict=True)]
    return {"weights": run["weights"], "graphs": graphs}


def _graph(graph: GraphReport, kernels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    before, after = graph.lines(BEFORE), graph.lines(AFTER)
    sources: dict[str, int] = {}
    steps = []
    for kernel in kernels:
        source = sources.setdefault(kernel["definition"], len(sources)) if kernel["definition"] else -1
        steps.append({name: kernel[name] for name in ("name", "nodes", "weights", "call")} | {"source": source})
    return {
        "from_cache": graph.from_cache,
        "before": [_line(line) for line in before],
        "after": [_line(line) for line in after],
        "diff": list(diff.rows(before, after)),
        "kernels": steps,
        "sources": list(sources),
        "listings": dict(_listings(graph)),
    }


def _line(line: Line) -> dict[str, Any]:
    """The fields that say anything."""
    fields = {"text": line.text, "node": line.node, "weights": line.weights, "reads": line.reads}
    return {name: value for name, value in fields.items() if value}


def _listings(graph: GraphReport) -> Iterator[tuple[str, str]]:
    """Everything else there is to read of a graph, each under its title."""
    for stage, graphs in graph.stages.items():
        if stage not in (BEFORE, AFTER):
            for number, lines in enumerate(graphs, 1):
                yield _numbered(stage, number, len(graphs)), "\n".join(map(str, lines))
    for number, code in enumerate(graph.code, 1):
        yield _numbered("generated code", number, len(graph.code)), code.text


def _numbered(title: str, number: int, count: int) -> str:
    return title if count == 1 else f"{title} {number} of {count}"
