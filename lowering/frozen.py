"""Graphs whose weights freezing has baked in: noticing that one of them changed.

Inductor itself never looks at a frozen parameter again, and a packed constant cannot be refreshed. So a
change answers from the eager graph, which reads the parameters, and has Dynamo compile again.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from mxfp8_ops import settings

from . import compat
from .watch import Watch, layouts
from .weights import FOLDED, WeightReport

log = logging.getLogger(__name__)

_lock = threading.Lock()
_calls: weakref.WeakSet[FrozenCall] = weakref.WeakSet()


class FrozenCall:
    """A compiled graph that checks its folded constants at every call."""

    def __init__(self, compiled: Callable[..., Any], eager: fx.GraphModule, tensors: list[Tensor]) -> None:
        self.compiled, self.eager, self.tensors = compiled, eager, tensors
        self.seen, self.layouts = Watch(tensors), layouts(tensors)
        self.stale = False
        with _lock:
            _calls.add(self)

    @staticmethod
    def around(
        compiled: Callable[..., Any], gm: fx.GraphModule, constants: list[tuple[WeightReport, Tensor, Tensor]]
    ) -> Callable[..., Any]:
        """``compiled`` itself where freezing folded and packed nothing."""
        made = [pair for each, *pair in constants if each.action == FOLDED or each.bytes_packed]
        tensors = [tensor for pair in made for tensor in pair]
        tensors = [tensor for tensor in tensors if not tensor.is_inference()]  # these have no version
        return FrozenCall(compiled, compat.copy_graph_module(gm), tensors) if tensors else compiled

    def __call__(self, *args: Any) -> Any:
        if not self.stale and self.seen.sees_no_change(self.tensors) and layouts(self.tensors) == self.layouts:
            return self.compiled(*args)
        if not self.stale:
            self.expire()
        return self.eager(*args)

    def expire(self) -> None:
        """Stops using the compiled graph, and makes Dynamo compile again at the next call."""
        log.warning("a frozen MXFP8 weight was changed: answering from the eager graph, compiling again")
        self.stale = True
        settings.invalidate_compiled()


def expire(tensors: Iterable[Tensor]) -> None:
    """Expires every frozen graph that holds one of ``tensors``."""
    ids = {id(tensor) for tensor in tensors}
    with _lock:
        calls = list(_calls)
    for call in calls:
        if not call.stale and any(id(tensor) in ids for tensor in call.tensors):
            call.expire()
