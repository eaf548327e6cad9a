"""Reports as plain data: what JSON and the page are made of. The schema is ``schema.json`` beside this file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch

import mxfp8_ops

from ..report import GraphReport
from ..text import Line
from .kernels import kernels
from .summary import Report

SCHEMA_VERSION = 2


def document(reports: Sequence[Report]) -> dict[str, Any]:
    """Several reports on one model, side by side; no times and no paths in it."""
    return {
        "schema": SCHEMA_VERSION,
        "title": reports[0].title if reports else "",
        "versions": {"mxfp8_ops": mxfp8_ops.__version__, "torch": torch.__version__},
        "runs": [_run(report) for report in reports],
    }


def to_json(reports: Sequence[Report]) -> str:
    """The document as text, indented, keys in a fixed order."""
    return json.dumps(document(reports), indent=1, ensure_ascii=False) + "\n"


def _run(report: Report) -> dict[str, Any]:
    return {
        "settings": report.settings,
        "weights_glob": report.weights_glob,
        "counts": report.counts,
        "memory": dataclasses.asdict(report.memory),
        "weights": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "action": row.action,
                "reason": row.reason,
                "kernel": row.kernel,
                "device": row.device,
                "bytes_before": row.bytes_before,
                "bytes_after": row.bytes_after,
                "bytes_dequantized": row.bytes_dequantized,
                "bytes_packed": row.bytes_packed,
                "decoding": row.decoding,
            }
            for row in report.weights
        ],
        "plain_linears": [
            {"name": each.name, "shape": list(each.shape), "dtype": each.dtype, "bytes": each.nbytes}
            for each in report.plain
        ],
        "graphs": [_graph(graph) for graph in report.graphs],
        "graph_breaks": [dataclasses.asdict(each) for each in report.breaks],
        "reused_calls": report.reused,
        "notes": report.notes,
    }


def _graph(graph: GraphReport) -> dict[str, Any]:
    return {
        "graph_break": dataclasses.asdict(graph.graph_break) if graph.graph_break else None,
        "from_cache": graph.from_cache,
        "stages": {stage: [list(map(_line, lines)) for lines in each] for stage, each in graph.stages.items()},
        "kernels": [dataclasses.asdict(step) for step in kernels(graph)],
        "code": [code.text for code in graph.code],
    }


def _line(line: Line) -> dict[str, Any]:
    return {"text": line.text, "node": line.node, "weights": list(line.weights), "reads": line.reads}
