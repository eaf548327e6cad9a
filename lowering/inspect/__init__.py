"""Seeing what ``torch.compile`` does to every MXFP8 weight: ``explain`` compiles a model to report on it,
``capture`` reports on a compile of the user's own.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mxfp8_ops import settings

from .. import backend, compat, introspection, report
from ..report import GraphBreak, GraphReport
from . import stages
from .kernels import name_kernels
from .summary import Report

__all__ = ["Report", "capture", "explain"]

FLAG_WORDS = {True: "on", False: "off", None: "unset"}


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    dequant_at_load: bool | None = None,
    freezing: bool = False,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    title: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compiles ``model`` as ``backend="mxfp8"`` does, by calling it once, and reports on every weight and graph.

    It compiles without caches on disk, and leaves nothing behind: no compiled code, no dequantized weights, no
    released ones. The call itself is real: it runs the model once.

    Args:
        model: a module or function; of a compiled one, what was compiled.
        inputs: its positional arguments.
        kwargs: its keyword arguments.
        dequant_at_load: beats ``MXFP8_DEQUANT_AT_LOAD`` unless None.
        freezing: with Inductor's freezing, and so without gradients.
        dynamic: as of ``torch.compile``.
        options: Inductor's, as of ``torch.compile``.
        title: of the report; the name of the model's class or function by default.
        progress: called with what is being done.

    Raises:
        ValueError, TypeError: a flag has no meaning, or an option is not Inductor's. Whatever else the model and
        its compilation raise.
    """
    model, kwargs = compat.uncompiled(model), dict(kwargs or {})
    ours = backend.Options(dequant_at_load)
    if not_inductors := backend.Options.__dataclass_fields__.keys() & dict(options or {}).keys():
        raise TypeError(f"options are Inductor's: {', '.join(sorted(not_inductors))} is none, see explain's arguments")
    result = _report(title or _name_of(model), dequant_at_load, freezing=freezing, dynamic=dynamic, caches=False)
    names = _names(model, inputs, kwargs)
    compiled: list[list[Callable[..., Any]]] = []

    def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if progress is not None:
            progress(f"compiling graph {len(compiled) + 1}")
        patches, inductor = compat.inductor(None, dict(options or {}))
        cell = [backend.lower(gm, example_inputs, ours, stages.install(patches), inductor, names)]
        compiled.append(cell)
        return lambda *args: cell[0](*args)

    inductor_config = {"force_disable_caches": True, "freezing": freezing}
    grad = torch.no_grad() if freezing else contextlib.nullcontext()
    with (
        _listening(result, threading.get_ident()),
        grad,
        torch._inductor.config.patch(inductor_config),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        try:
            torch.compile(_own_frame(model), backend=compile_graph, dynamic=dynamic)(*inputs, **kwargs)
        finally:
            for cell in compiled:
                cell.clear()  # Dynamo may keep the function around it; this backend's it never calls again
            gc.collect()  # compiled code and the weights it holds are full of cycles
    result.reused = 0
    return result


@contextlib.contextmanager
def capture(title: str = "") -> Iterator[Report]:
    """Reports on whatever is compiled inside the ``with`` block, in any thread, through ``backend="mxfp8"``,
    ``enable()`` or ``options()``. The report is complete when the block ends.

    Code that was found in a cache is reported as that: see ``Report.notes``.
    """
    result = _report(title, None, freezing=bool(torch._inductor.config.freezing), dynamic=None, caches=True)
    with _listening(result):
        yield result


def _report(title: str, flag: bool | None, *, freezing: bool, dynamic: bool | None, caches: bool) -> Report:
    words: dict[str, Any] = {"dequant_at_load": FLAG_WORDS[settings.dequant_at_load(flag)], "freezing": freezing}
    words |= {"dynamic": dynamic, "caches": caches}
    switches = {"passes": settings.passes(), "kernels": settings.kernels(), "compiler": compat.compiler_is_on()}
    words |= {name: FLAG_WORDS[on] for name, on in switches.items()}
    return Report(title, words)


@contextlib.contextmanager
def _listening(result: Report, thread: int | None = None) -> Iterator[None]:
    def reused() -> None:
        result.reused += 1

    breaks, start = introspection.graph_breaks(), time.perf_counter()
    with report.collect(result.graphs, thread), stages.generated_code(), introspection.reused_code(reused):
        try:
            yield
        finally:
            result.seconds = time.perf_counter() - start
            result.breaks = _other_breaks(breaks, result.graphs)
            for graph in result.graphs:
                name_kernels(graph)


def _other_breaks(before: Mapping[str, int], graphs: Sequence[GraphReport]) -> list[GraphBreak]:
    """Graph breaks since ``before`` that end no graph: those met before the first operator of a frame."""
    known = {(each.graph_break.reason, each.graph_break.explanation) for each in graphs if each.graph_break}
    texts = [text for text, count in introspection.graph_breaks().items() if count > before.get(text, 0)]
    breaks = [GraphBreak.of(text) for text in texts]
    return [each for each in breaks if each is not None and (each.reason, each.explanation) not in known]


def _own_frame(model: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` behind a function whose code is new each time: what Dynamo remembers of it goes when it goes,
    and does not count towards the recompile limit of the user's own compiles.
    """
    fn = model

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def _name_of(model: Callable[..., Any]) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


def _names(model: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, str]:
    """Names of the tensors of a call, by ``id``: of arguments as the function calls them, of weights their
    paths in the model, whichever module's frame Dynamo meets them in.
    """
    names: dict[int, str] = {}
    with contextlib.suppress(TypeError, ValueError):
        function = model.forward if isinstance(model, nn.Module) else model
        for name, argument in inspect.signature(function).bind(*inputs, **kwargs).arguments.items():
            if isinstance(argument, Tensor):
                names[id(argument)] = name
    if isinstance(model, nn.Module):
        for tensors in (model.named_buffers(), model.named_parameters()):
            names |= {id(tensor): name for name, tensor in tensors}
    return names
