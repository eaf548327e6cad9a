"""The ``"mxfp8"`` backend: Inductor, with weights dequantized first when the flag is on, else packed where that pays.

``lower`` is what the backend and ``lowering.enable()`` share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mxfp8_ops import environment, settings

from . import compat, passes, released, report
from . import fold as fold  # registers the freezing pattern
from .forms import Wanted
from .frozen import FrozenCall


@dataclass(frozen=True)
class Options:
    """What the user asked of the lowering.

    Attributes:
        dequant_at_load: beats ``MXFP8_DEQUANT_AT_LOAD`` unless None. Only True folds.
        release_quantized: frees the quantized bytes of weights that were dequantized or packed. Eager use of such a
            weight raises, its compiled graphs and their recompiles keep working.
        pack_at_load: beats ``MXFP8_PACK_AT_LOAD`` unless None: whether weights that are not folded are packed for the
            kernels of GPUs. If neither says so, they are where those kernels read packed weights.
        merge_linears: beats ``MXFP8_MERGE_LINEARS`` unless None: whether linears on the same x become one. If neither
            says so, they do on GPUs.
    """

    dequant_at_load: bool | None = None
    release_quantized: bool = False
    pack_at_load: bool | None = None
    merge_linears: bool | None = None

    def __post_init__(self) -> None:
        self.wanted()  # raises on a bad value
        if not isinstance(self.release_quantized, bool):
            raise TypeError(f"release_quantized must be True or False, got {self.release_quantized!r}")

    def wanted(self) -> Wanted:
        """What these options and the environment now say."""
        return Wanted(
            settings.dequant_at_load(self.dequant_at_load) is True,
            settings.pack_at_load(self.pack_at_load),
            settings.merge_linears(self.merge_linears),
            self.release_quantized,
        )


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
        options: those of ``Options``, and any of Inductor's.

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
    names: Mapping[int, str] | None = None,
) -> Callable[..., Any]:
    """Recognises, folds and reports one Dynamo graph, and compiles what results.

    Args:
        gm: Dynamo's graph; not changed.
        example_inputs: one for each of its placeholders.
        options: ours.
        patches: the caller's patches of Inductor's configuration.
        compile_graph: Inductor.
        names: what reports are to call a tensor, by its ``id``; else the name follows from Dynamo's.
    """
    if not settings.passes():
        for tensor in (*example_inputs, *gm.__dict__.values(), *gm.parameters(), *gm.buffers()):
            released.refuse(tensor, "a weight", f"{environment.PASSES} is off")
        return compile_graph(gm, example_inputs, patches)
    wanted = options.wanted()
    graph_report, hoist, folded = passes.rewrite(gm, example_inputs, wanted, names or {})
    own = passes.LowerPass(wanted.dequantize, wanted.pack, graph_report)
    with passes.lowering(), graph_report.timed("total"):
        compiled = compile_graph(folded.gm, folded.inputs, passes.install(patches, compat.POST_GRAD, own))
    for part in ("passes", "dequantize"):
        graph_report.seconds["total"] += graph_report.seconds.get(part, 0.0)
    report.log_graph(graph_report)
    return FrozenCall.around(folded.wrap(compiled), gm, hoist.constants)
