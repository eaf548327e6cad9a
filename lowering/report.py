"""What was done to each weight, and why: the data behind every inspection script.

One ``GraphReport`` for each graph that passed through the lowering; the newest are kept in memory, and
logged under ``TORCH_LOGS="+lowering"``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FOLDED = "folded"
KEPT = "kept"


@dataclass
class WeightReport:
    """One MXFP8 weight of a graph.

    Attributes:
        name: dotted path of the weight, from the compiled module or function on.
        shape: of the weight.
        action: "folded" (a dequantized copy stands in the graph) or "kept" (the 1-byte weight does).
        reason: why it was kept, or how it was folded.
        bytes_before: of weight and scale.
        bytes_after: of everything held for this weight after the compile: the dequantized copy, and the
            packed bytes unless they were released.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        weights: in the order of their first use.
        before: text of Dynamo's graph as it came.
        after: text of the same graph after the lowering.
        post_grad: texts of the ATen graphs Inductor generated code from (forward, backward), as far as they
            were generated and did not come from a cache.
    """

    weights: list[WeightReport] = field(default_factory=list)
    before: str = ""
    after: str = ""
    post_grad: list[str] = field(default_factory=list)
    constants: list[tuple[WeightReport, weakref.ref[Tensor]]] = field(default_factory=list, repr=False)
    """Weights that Dynamo made constants of the graph, which freezing may fold; weakly, a report keeps no model."""

    def mark_frozen(self, weight: Tensor, dequantized: Tensor) -> None:
        """Notes that freezing folded the constant ``weight`` into ``dequantized``."""
        dtype = dtype_name(dequantized.dtype)
        for each, ref in self.constants:
            tensor = ref()
            if tensor is not None and (tensor is weight or tensor.data_ptr() == weight.data_ptr()):
                first = each.action != FOLDED
                each.reason = f"frozen, dequantized to {dtype}" if first else f"{each.reason}, {dtype}"
                each.action = FOLDED
                each.bytes_after += dequantized.nbytes

    def __str__(self) -> str:
        return format_table(self.weights)


_lock = threading.Lock()
_recent: deque[GraphReport] = deque(maxlen=256)
_captures: list[list[GraphReport]] = []
_thread = threading.local()


def recent() -> list[GraphReport]:
    """The newest reports of this process, oldest first (at most 256)."""
    with _lock:
        return list(_recent)


@contextlib.contextmanager
def capture() -> Iterator[list[GraphReport]]:
    """Collects the reports of all graphs compiled inside the ``with`` block, in any thread."""
    graphs: list[GraphReport] = []
    with _lock:
        _captures.append(graphs)
    try:
        yield graphs
    finally:
        with _lock:
            _captures[:] = [each for each in _captures if each is not graphs]


def publish(graph: GraphReport) -> None:
    """Adds a graph, and makes it the one that this thread's later passes complete."""
    _thread.current = graph
    with _lock:
        _recent.append(graph)
        for graphs in _captures:
            graphs.append(graph)


def current() -> GraphReport | None:
    """The graph this thread is compiling, or compiled last."""
    return getattr(_thread, "current", None)


def log_graph(graph: GraphReport) -> None:
    """Writes the weights of one graph to the log, one line each."""
    for weight in graph.weights:
        log.info(
            "%s %s %s: %d -> %d bytes (%s)",
            weight.action,
            weight.name,
            list(weight.shape),
            weight.bytes_before,
            weight.bytes_after,
            weight.reason,
        )


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def distinct(graphs: Iterable[GraphReport]) -> list[WeightReport]:
    """The weights of several graphs, each once, as the newest graph left it."""
    weights: dict[tuple[str, tuple[int, ...]], WeightReport] = {}
    for graph in graphs:
        for weight in graph.weights:
            weights[weight.name, weight.shape] = weight
    return list(weights.values())


def format_table(weights: Iterable[WeightReport]) -> str:
    """A plain-text table with totals, for terminals and pipes alike."""
    header = ("weight", "shape", "action", "bytes before", "bytes after", "reason")
    rows = [
        (w.name, "x".join(map(str, w.shape)), w.action, f"{w.bytes_before:,}", f"{w.bytes_after:,}", w.reason)
        for w in weights
    ]
    before, after = (sum(int(row[i].replace(",", "")) for row in rows) for i in (3, 4))
    rows.append((f"total: {len(rows)} weight{'s' * (len(rows) != 1)}", "", "", f"{before:,}", f"{after:,}", ""))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numeric = (3, 4)

    def line(row: tuple[str, ...]) -> str:
        cells = (c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows[:-1]), rule, line(rows[-1])])
