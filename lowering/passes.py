"""Our passes in Inductor's slots: what they share (identity, flag) and the two of them.

Every pass has a ``uuid`` made of this package's source, the flags and autocast's state: Inductor puts it into
its cache keys, so neither an upgrade nor a flag flipped between two processes finds the other's artifact.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import astuple
from pathlib import Path
from typing import Any

from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import mxfp8_ops
from mxfp8_ops import settings

from . import calls, compat, introspection, kernels, report
from .forms import Wanted
from .graph import label_leaves, leaf_name, leaves
from .hoist import FLAG_IS_OFF, Hoist
from .recognising import recognise, recognise_all
from .report import GraphBreak, GraphReport
from .slots import Folded
from .text import graph_lines

_ONLY_FREEZING = 'options() folds under freezing only; backend="mxfp8" or enable() fold without'


@functools.cache
def source_hash() -> bytes:
    """A hash of every source file of both packages."""
    folders = (Path(__file__).parent, Path(mxfp8_ops.__file__).parent)
    files = sorted(
        str(path) for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")
    )
    return get_hash_for_files(tuple(files))


class Mxfp8Pass(CustomGraphPass):
    """Base of our passes.

    Args:
        dequant_at_load, pack_at_load: beat the environment unless None, in which case it is read at every compile.
    """

    def __init__(self, dequant_at_load: bool | None = None, pack_at_load: bool | None = None) -> None:
        self.dequant_at_load, self.pack_at_load = dequant_at_load, pack_at_load

    @property
    def wanted(self) -> Wanted:
        """What is to become of weights that freezing makes constants: a compiler doubles memory only when asked."""
        fold = settings.dequant_at_load(self.dequant_at_load) is True
        return Wanted(fold, settings.pack_at_load(self.pack_at_load), settings.merge_linears())

    def uuid(self) -> Any:
        switches = (*astuple(self.wanted), settings.passes(), settings.kernels())
        return type(self).__name__, source_hash(), switches, compat.autocast_state()

    def __eq__(self, other: object) -> bool:
        ours = self.dequant_at_load, self.pack_at_load
        return type(self) is type(other) and ours == (other.dequant_at_load, other.pack_at_load)

    def __hash__(self) -> int:
        return hash((type(self), self.dequant_at_load, self.pack_at_load))


class RecognisePass(Mxfp8Pass):
    """Pre-grad: ``F.linear(x, dequant(w, s))`` becomes ``mxfp8::linear``; reports the graph's weights."""

    def __call__(self, graph: fx.Graph) -> None:
        gm, inputs = graph.owning_module, graph.find_nodes(op="placeholder")
        if not settings.passes():
            return
        if gm is None or is_lowering() or not compat.is_dynamo_graph(graph):
            recognise(graph)
            return  # reported already, or the sub-graph of an operator: reported with the graph that calls it
        fold = self.wanted.dequantize
        wanted = Wanted(fold, nothing=_ONLY_FREEZING if fold else FLAG_IS_OFF)
        rewrite(gm, [None] * len(inputs), wanted, names={}, in_place=True)


class LowerPass(Mxfp8Pass):
    """Post-grad: what was not folded is lowered; keeps the final graph's text for the report.

    Args:
        dequant_at_load, pack_at_load: see ``Mxfp8Pass``.
        graph_report: of the graph being compiled, whose backward may be compiled much later and in another thread.
            None where the pre-grad pass publishes it.
    """

    def __init__(
        self,
        dequant_at_load: bool | None = None,
        pack_at_load: bool | None = None,
        graph_report: GraphReport | None = None,
    ) -> None:
        super().__init__(dequant_at_load, pack_at_load)
        self.graph_report = None if graph_report is None else weakref.ref(graph_report)

    def __getstate__(self) -> dict[str, Any]:
        """Without the report, which no other process could use."""
        return {**self.__dict__, "graph_report": None}

    def __call__(self, graph: fx.Graph) -> None:
        if not settings.passes():
            return
        graph_report = current_report() or GraphReport()
        with graph_report.timed("passes"):
            if settings.kernels():
                kernels.lower_dequant(graph)
                calls.mark(graph)
            graph_report.record(report.POST_GRAD, graph)


def rewrite(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    wanted: Wanted,
    names: Mapping[int, str],
    in_place: bool = False,
) -> tuple[GraphReport, Hoist, Folded]:
    """Recognises and folds in a copy of one Dynamo graph, and publishes the report of it.

    Args:
        gm: the graph, changed only if ``in_place``.
        inputs, wanted: see ``Hoist``.
        names: see ``graph.label_leaves``.
    """
    graph_report = GraphReport(graph_break=GraphBreak.of(*(introspection.graph_break_of(gm) or (None,))))
    with graph_report.timed("passes"):
        copy = compat.copy_graph_module(gm)
        changed, unchanged = (gm, copy) if in_place else (copy, gm)
        label_leaves(changed, inputs, names)
        labels = {node.name: leaf_name(node) for node in leaves(changed.graph)}
        attributes = changed.graph.find_nodes(op="get_attr")
        constants = [(getattr(gm, str(node.target), None), leaf_name(node)) for node in attributes]
        graph_report.labels = [(weakref.ref(each), name) for each, name in constants if isinstance(each, Tensor)]
        recognised = recognise_all(changed)
        hoist = Hoist(changed, inputs, wanted, graph_report)
        folded = hoist.run()
        graph_report.inputs = [leaf_name(node) for node in changed.graph.find_nodes(op="placeholder")]
        before = after = graph_lines(changed, graph_report.owners)
        if recognised or folded.slots:
            before = graph_lines(unchanged, graph_report.owners, lambda node: labels.get(node.name) or leaf_name(node))
        graph_report.add_stage(report.BEFORE, before)
        graph_report.add_stage(report.AFTER, after)
        report.publish(graph_report)
    graph_report.seconds["passes"] -= graph_report.seconds.get("dequantize", 0.0)
    return graph_report, hoist, folded


_lowering: ContextVar[bool] = ContextVar("mxfp8_lowering", default=False)


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Around the compilation of a graph that ``backend.lower`` has already seen to."""
    token = _lowering.set(True)
    try:
        yield
    finally:
        _lowering.reset(token)


def is_lowering() -> bool:
    """Whether this thread compiles such a graph, which needs no second round and no second report."""
    return _lowering.get()


def active() -> LowerPass | None:
    """Our pass in Inductor's current configuration, None when this compilation is not ours."""
    ours = [each for each in compat.current_passes(compat.POST_GRAD) if isinstance(each, LowerPass)]
    return ours[-1] if ours else None


def current_report() -> GraphReport | None:
    """The report of the graph that is being compiled in this thread, None if it is none of ours."""
    ours = active()
    if ours is None:
        return None
    return report.current() if ours.graph_report is None else ours.graph_report()


def install(patches: dict[str, Any], slot_name: str, own: Mxfp8Pass) -> dict[str, Any]:
    """Configuration patches with our pass added: after the user's passes in that slot, which are those of
    ``patches``, or of Inductor's configuration where the patches leave the slot alone.
    """
    slot = patches.get(slot_name)
    others = compat.current_passes(slot_name) if slot is None else compat.passes_in(slot)
    kept = [each for each in others if type(each) is not type(own)]
    return {**patches, slot_name: compat.as_slot([*kept, own])}
