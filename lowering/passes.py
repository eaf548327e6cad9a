"""Our passes in Inductor's slots: what they share (identity, flag) and the two of them.

Every pass has a ``uuid`` made of this package's source, the flag and autocast's state: Inductor puts it into
its cache keys, so neither an upgrade nor a flag flipped between two processes finds the other's artifact.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import mxfp8_ops
from mxfp8_ops import settings

from . import compat, kernels, report
from .graph import recognise
from .hoist import Hoist
from .report import GraphReport
from .text import graph_text

FLAG_IS_OFF = "the flag is not on"
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
        dequant_at_load: beats the environment unless None, in which case the flag is read at every compile.
    """

    def __init__(self, dequant_at_load: bool | None = None) -> None:
        self.dequant_at_load = dequant_at_load

    @property
    def fold(self) -> bool:
        """Whether load-time dequant is folded: a compiler doubles memory only when asked."""
        return settings.dequant_at_load(self.dequant_at_load) is True

    def uuid(self) -> Any:
        return type(self).__name__, source_hash(), self.fold, compat.autocast_state()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.dequant_at_load == other.dequant_at_load

    def __hash__(self) -> int:
        return hash((type(self), self.dequant_at_load))


class RecognisePass(Mxfp8Pass):
    """Pre-grad: ``F.linear(x, dequant(w, s))`` becomes ``mxfp8::linear``; reports the graph's weights."""

    def __call__(self, graph: fx.Graph) -> None:
        gm, inputs = graph.owning_module, graph.find_nodes(op="placeholder")
        recognise(graph)
        if gm is None or is_lowering() or not compat.is_dynamo_graph(graph):
            return  # reported already, or the sub-graph of an operator: reported with the graph that calls it
        graph_report = GraphReport(before=graph_text(gm))
        hoist = Hoist(gm, [None] * len(inputs), _ONLY_FREEZING if self.fold else FLAG_IS_OFF, release=False)
        hoist.run()
        graph_report.after = graph_text(gm)
        graph_report.weights = hoist.weights
        graph_report.constants = [(each, weakref.ref(weight)) for each, weight, _ in hoist.constants]
        report.publish(graph_report)


class LowerPass(Mxfp8Pass):
    """Post-grad: what was not folded is lowered; keeps the final graph's text for the report."""

    def __call__(self, graph: fx.Graph) -> None:
        kernels.lower_dequant(graph)
        graph_report = report.current()
        if graph_report is not None and graph.owning_module is not None:
            graph_report.post_grad.append(graph_text(graph.owning_module))


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


def install(patches: dict[str, Any], slot_name: str, own: Mxfp8Pass) -> dict[str, Any]:
    """Configuration patches with our pass added: after the user's passes in that slot, which are those of
    ``patches``, or of Inductor's configuration where the patches leave the slot alone.
    """
    slot = patches.get(slot_name)
    others = compat.current_passes(slot_name) if slot is None else compat.passes_in(slot)
    kept = [each for each in others if type(each) is not type(own)]
    return {**patches, slot_name: compat.as_slot([*kept, own])}
