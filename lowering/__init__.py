"""What torch.compile does with MXFP8 operators: recognise, fold, lower, report.

Three ways in: ``torch.compile(m, backend="mxfp8")``, ``torch.compile(m, options=lowering.options())``, and
``lowering.enable()`` for every plain ``torch.compile(m)`` of the process. ``lowering.explain(m, *inputs)`` and
``lowering.capture()`` say what it did. ``lowering.aoti_package(m, inputs, path)`` compiles ahead of time.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import compat, frozen, passes, report, store
from .aoti import aoti_package
from .backend import Options
from .inspect import Report, capture, explain
from .switch import disable, enable

__all__ = [
    "Options",
    "Report",
    "aoti_package",
    "capture",
    "disable",
    "enable",
    "explain",
    "options",
    "refresh",
    "report",
]


def options(dequant_at_load: bool | None = None, pack_at_load: bool | None = None, **inductor: Any) -> dict[str, Any]:
    """Options for ``torch.compile(m, options=lowering.options())``: Inductor's own backend with our passes.

    They recognise ``F.linear(x, dequant(w, s))``, lower dequant to one loop, and with the flag on fold what
    Inductor's freezing makes constant, and with the flag off pack it. (Without freezing, that needs the backend, or
    ``enable()``.)

    Args:
        dequant_at_load: beats ``MXFP8_DEQUANT_AT_LOAD`` unless None.
        pack_at_load: beats ``MXFP8_PACK_AT_LOAD`` unless None.
        inductor: further options of Inductor; passes of yours in our two slots run before ours.

    Raises:
        TypeError: a flag is no bool, or an option is one that only the backend and ``enable()`` have.
    """
    Options(dequant_at_load, pack_at_load=pack_at_load)  # raises on a bad value
    if only_the_backends := sorted(Options.__dataclass_fields__.keys() & inductor.keys()):
        raise TypeError(
            f"lowering.options() has no {', '.join(only_the_backends)}: "
            'passes cannot do that; use torch.compile(m, backend="mxfp8", options={...}) or lowering.enable()'
        )
    patches = {**compat.run_pre_grad_on_every_compile(), **inductor}
    patches = passes.install(patches, compat.PRE_GRAD, passes.RecognisePass(dequant_at_load))
    return passes.install(patches, compat.POST_GRAD, passes.LowerPass(dequant_at_load, pack_at_load))


def refresh(model: nn.Module) -> None:
    """Tells compiled graphs that weights of ``model`` changed in a way that leaves no trace, such as
    ``weight.data.copy_(...)``: folded values are made again at the next call. Does not reach what freezing folded
    under ``options()``, whose graphs are not ours to check: ``torch._dynamo.reset()`` does.
    """
    tensors = [*model.parameters(), *model.buffers()]
    store.expire(tensors)
    frozen.expire(tensors)
