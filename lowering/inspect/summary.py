"""The result of an inspection: every graph of one compile, and what it comes to."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from .. import report, weights
from ..report import GraphBreak, GraphReport
from ..weights import ACTIONS, Memory, PlainLinear, WeightReport


@dataclass(repr=False)
class Report:
    """What ``lowering.explain`` and ``lowering.capture`` give: prints as a table, shows itself in notebooks.

    Attributes:
        title: what was compiled.
        settings: under which it was: "dequant_at_load" ("on", "off" or "unset"), "freezing", "dynamic",
            "caches", and those of MXFP8_PASSES, MXFP8_KERNELS and torch's compiler.
        graphs: one for each graph that Dynamo made, in order.
        breaks: graph breaks that no graph of ours ends at.
        reused: calls that found their compiled code in Dynamo's memory.
        seconds: the whole took.
        weights_glob: the rows it was reduced to by ``only``.
    """

    title: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    reused: int = 0
    seconds: float = 0.0
    weights_glob: str = ""

    @property
    def label(self) -> str:
        """The settings in a few words."""
        words = [f"flag {self.settings.get('dequant_at_load', 'unset')}"]
        words += [name for name in ("freezing", "dynamic") if self.settings.get(name)]
        words += [f"{name} off" for name in ("passes", "kernels") if self.settings.get(name) == "off"]
        return ", ".join(words)

    @property
    def weights(self) -> list[WeightReport]:
        """Every MXFP8 weight once, as the last graph that read it left it."""
        return report.distinct(self.graphs)

    @property
    def plain(self) -> list[PlainLinear]:
        """Linears on weights that are not MXFP8."""
        return list(dict.fromkeys(each for graph in self.graphs for each in graph.plain))

    @property
    def memory(self) -> Memory:
        """Bytes of the weights before, at most during, and after the compile."""
        return weights.memory(self.weights)

    @property
    def counts(self) -> dict[str, int]:
        """How many weights were folded, kept and unmatched."""
        actions = [weight.action for weight in self.weights]
        return {action: actions.count(action) for action in ACTIONS}

    @property
    def pass_seconds(self) -> float:
        """What the lowering added to the compile."""
        return sum(graph.seconds.get("passes", 0.0) for graph in self.graphs)

    @property
    def compile_seconds(self) -> float:
        """What the lowering and Inductor took, without Dynamo."""
        return sum(graph.seconds.get("total", 0.0) for graph in self.graphs)

    @property
    def notes(self) -> list[str]:
        """What else there is to know, a line each."""
        found = []
        cached = sum(graph.from_cache for graph in self.graphs)
        if self.settings.get("passes") == "off":
            found.append("MXFP8_PASSES is off: graphs went to Inductor as they are, nothing was recorded")
        elif self.settings.get("compiler") == "off":
            found.append("nothing was compiled: TORCH_COMPILE_DISABLE is set")
        elif not self.graphs and not self.reused:
            found.append('nothing was compiled through backend="mxfp8", enable() or options()')
        elif self.graphs and not any(graph.weights for graph in self.graphs):
            how = f"that matches {self.weights_glob!r}" if self.weights_glob else ""
            found.append(
                f"no MXFP8 weight {how}" if how else "no MXFP8 weight: swap linears with mxfp8_ops.quantize_(model)"
            )
        if cached:
            found.append(
                f"cache hit: the code of {cached} of {len(self.graphs)} graphs was found on disk, not generated"
            )
        if self.reused:
            calls = f"{self.reused} call{'s' * (self.reused != 1)}"
            found.append(
                f"cache hit: {calls} ran code compiled earlier in this process, which is not reported again; "
                "torch._dynamo.reset() makes it compile anew"
            )
        return found

    def only(self, glob: str) -> Report:
        """The same with those weights whose names match ``glob`` (as in ``fnmatch``, case counts)."""

        def matches(name: str) -> bool:
            return fnmatch.fnmatchcase(name, glob)

        graphs = []
        for graph in self.graphs:
            stages = {
                stage: [
                    [dataclasses.replace(line, weights=tuple(filter(matches, line.weights))) for line in lines]
                    for lines in graphs_of_stage
                ]
                for stage, graphs_of_stage in graph.stages.items()
            }
            weights = [each for each in graph.weights if matches(each.name)]
            plain = [each for each in graph.plain if matches(each.name)]
            graphs.append(dataclasses.replace(graph, weights=weights, plain=plain, stages=stages))
        return dataclasses.replace(self, graphs=graphs, weights_glob=glob)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {action}" for action, count in self.counts.items())
        return f"<Report on {self.title or 'a compile'}: {self.label}, {counts}>"

    def __str__(self) -> str:
        lines = [weights.format_table(self.weights)] if self.weights else []
        for number, graph in enumerate(self.graphs, start=1):
            if graph.graph_break is not None:
                lines.append(f"graph {number} of {len(self.graphs)} ends at a graph break: {graph.graph_break}")
        lines += [f"graph break: {each}" for each in self.breaks]
        lines += [f"note: {note}" for note in self.notes]
        if self.compile_seconds:
            share = self.pass_seconds / self.compile_seconds
            lines.append(f"passes: {self.pass_seconds:.3f} s of {self.compile_seconds:.2f} s, {share:.2%}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from . import html

        return html.fragment(self)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The report as JSON, see ``schema.json`` beside this file; also written to ``path``. Times are left
        out, so that two runs of one model give the same text.
        """
        from . import document

        return _written(document.to_json([self]), path)

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """The report as one self-contained page; also written to ``path``."""
        from . import html

        return _written(html.page([self]), path)


def _written(text: str, path: str | PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
