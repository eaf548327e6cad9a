"""The ``"mxfp8"`` backend: Inductor, with load-time dequant folded first when the flag is on.

``lower`` is what the backend and ``lowering.enable()`` share.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mxfp8_ops import settings

from . import compat, passes, report
from . import fold as fold  # registers the freezing pattern
from .frozen import FrozenCall
from .graph import recognise_all
from .hoist import Hoist
from .report import GraphReport
from .text import graph_text


@dataclass(frozen=True)
class Options:
    """What the user asked of the lowering.

    Attributes:
        dequant_at_load: beats ``MXFP8_DEQUANT_AT_LOAD`` unless None. Only True folds.
        release_quantized: frees the packed bytes of folded weights. Eager use of such a weight raises, its
            compiled graphs and their recompiles keep working.
    """

    dequant_at_load: bool | None = None
    release_quantized: bool = False

    def __post_init__(self) -> None:
        settings.dequant_at_load(self.dequant_at_load)  # raises on a bad value
        if not isinstance(self.release_quantized, bool):
            raise TypeError(f"release_quantized must be True or False, got {self.release_quantized!r}")


def mxfp8(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="mxfp8")``.

    Args:
        gm: Dynamo's graph; not changed.
        example_inputs: one for each of its placeholders.
        mode: as of ``torch.compile``: "reduce-overhead", "max-autotune", ...
        options: ``dequant_at_load`` and ``release_quantized`` (see ``Options``), and any of Inductor's.

    Raises:
        ValueError: the environment flag is neither on nor off, or a released weight would be read.
        TypeError: an option of ours has the wrong type. RuntimeError: Inductor knows no such option.
    """
    inductor_options = dict(options or {})
    names = Options.__dataclass_fields__.keys() & inductor_options.keys()
    ours = Options(**{name: inductor_options.pop(name) for name in names})
    patches, compile_graph = compat.inductor(mode, inductor_options)
    return lower(gm, example_inputs, ours, patches, compile_graph)


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    patches: dict[str, Any],
    compile_graph: compat.Compile,
) -> Callable[..., Any]:
    """Recognises, folds and reports one Dynamo graph, and compiles what results.

    Args:
        gm: Dynamo's graph; not changed.
        example_inputs: one for each of its placeholders.
        options: ours.
        patches: the caller's patches of Inductor's configuration.
        compile_graph: Inductor.
    """
    fold = settings.dequant_at_load(options.dequant_at_load) is True
    graph_report = GraphReport(before=graph_text(gm))
    copy = compat.copy_graph_module(gm)
    recognise_all(copy)
    hoist = Hoist(copy, example_inputs, "" if fold else passes.FLAG_IS_OFF, options.release_quantized)
    folded = hoist.run()
    graph_report.after = graph_text(folded.gm)
    graph_report.weights = hoist.weights
    graph_report.constants = [(each, weakref.ref(weight)) for each, weight, _ in hoist.constants]
    report.publish(graph_report)
    own = passes.LowerPass(fold)
    with passes.lowering():
        compiled = compile_graph(folded.gm, folded.inputs, passes.install(patches, compat.POST_GRAD, own))
    report.log_graph(graph_report)
    return FrozenCall.around(folded.wrap(compiled), gm, hoist.constants)
