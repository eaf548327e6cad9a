"""What torch tells of a compile: where nodes come from, which code was generated, why a graph ended. Private APIs as in
``compat``, each behind one function that says which versions have which form.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx


def input_position(node: fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of an ATen graph is, None where that cannot be told. Since
    torch 2.9 AOTAutograd describes its inputs; before, and in backward graphs, their names count.
    """
    index = getattr(node.meta.get("desc"), "idx", None)
    if isinstance(index, int):
        return index
    found = re.fullmatch(r"(arg|primals_)(\d+)(?:_1)?", node.name)
    return None if found is None else int(found[2]) - (found[1] == "primals_")


def source_nodes(node: fx.Node) -> tuple[str, ...]:
    """Names of the nodes of Dynamo's graph that an ATen node comes from, as far as torch kept track."""
    found: dict[str, None] = {}
    pending = list(node.meta.get("from_node", ()))
    for source in pending:
        pending.extend(source.from_node)
        if not source.from_node and source.name:
            found[source.name] = None
    return tuple(found)


def provenance() -> dict[str, Any]:
    """Options with which Inductor keeps track of the nodes behind each kernel it generates (torch >= 2.9)."""
    trace = torch._inductor.config.trace
    return {"trace.provenance_tracking_level": 1} if hasattr(trace, "provenance_tracking_level") else {}


def kernel_handles() -> dict[str, tuple[str, ...]]:
    """While code is handed to ``output_code``: the post-grad nodes behind each call in it, under
    ``provenance()``.
    """
    import torch._inductor.debug as debug

    table = getattr(debug, "_inductor_triton_kernel_to_post_grad_node_info", {})
    return {handle: tuple(sorted(nodes)) for handle, nodes in table.items()}


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same or views of the same bytes; no for those without bytes, such as the
    weights oneDNN packs.
    """
    if a is b:
        return True
    try:
        return a.data_ptr() == b.data_ptr() != 0
    except RuntimeError:
        return False


def graph_break_of(gm: fx.GraphModule) -> tuple[str, list[Any]] | None:
    """Why Dynamo ended a graph early, and where: its text and the stack of the user's code, outermost first.
    None if the function simply returns.
    """
    found = getattr(gm, "compile_subgraph_reason", None)
    return (found.reason, list(found.user_stack)) if found is not None and found.graph_break else None


def graph_breaks() -> dict[str, int]:
    """Dynamo's texts of all graph breaks of this process, those before any operator too, and how often."""
    return dict(torch._dynamo.utils.counters["graph_break"])


class _Tap:
    """A place inside torch where callbacks are called: tapped with the first of them, left alone after the last,
    in whatever order threads come and go.

    Args:
        install: puts a function there, and returns one that takes it away again.
    """

    def __init__(self, install: Callable[[Callable[..., None]], Callable[[], None]]) -> None:
        self.install, self.lock = install, threading.Lock()
        self.receivers: list[Callable[..., None]] = []
        self.uninstall: Callable[[], None] | None = None

    @contextlib.contextmanager
    def __call__(self, receive: Callable[..., None]) -> Iterator[None]:
        with self.lock:
            if not self.receivers:
                self.uninstall = self.install(self._send)
            self.receivers = [*self.receivers, receive]
        try:
            yield
        finally:
            with self.lock:
                self.receivers = [each for each in self.receivers if each is not receive]
                if not self.receivers and self.uninstall is not None:
                    self.uninstall()

    def _send(self, *args: Any) -> None:
        for receive in self.receivers:
            receive(*args)


def _tap_output_code(send: Callable[..., None]) -> Callable[[], None]:
    from torch._inductor.graph import GraphLowering

    before = GraphLowering.save_output_code

    def save(code: str) -> None:
        if before is not None:
            before(code)
        send(code)

    def uninstall() -> None:
        GraphLowering.save_output_code = before if before is None else staticmethod(before)

    GraphLowering.save_output_code = staticmethod(save)
    return uninstall


def _tap_reused(send: Callable[..., None]) -> Callable[[], None]:
    eval_frame: Any = torch._C._dynamo.eval_frame

    def hook(found: bool) -> bool:
        if found:
            send()
        return before is None or before(found)

    before = eval_frame.set_guard_complete_hook(hook)
    return lambda: eval_frame.set_guard_complete_hook(before)


output_code = _Tap(_tap_output_code)
"""``with output_code(receive):`` hands every piece of code that Inductor generates, in any thread, to ``receive``."""

reused_code = _Tap(_tap_reused)
"""``with reused_code(receive):`` calls ``receive`` for every frame that finds its code in Dynamo's memory."""


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Writes what ``text`` returns to the file of ``TORCH_TRACE``, where tlparse shows it. Does nothing without one,
    or in a torch that has no such channel.
    """
    trace = getattr(torch._logging, "trace_structured", None)
    if trace is not None:
        trace("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
