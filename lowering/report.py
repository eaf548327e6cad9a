"""What was done to the weights of each graph, and why: the data behind every inspection.

One ``GraphReport`` for each graph that passed through the lowering. The newest are kept in memory, logged under
``TORCH_LOGS="+lowering"`` and written to ``TORCH_TRACE``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import FrameSummary

import torch
from torch import Tensor, fx

from . import introspection
from .forms import Form, Packed
from .graph import leaf_name
from .text import Line, Owners, dtype_name, graph_lines
from .weights import PENDING, PlainLinear, WeightReport, format_table, kernel_text

log = logging.getLogger(__name__)

BEFORE, AFTER, AOT, JOINT, POST_GRAD = "before", "after", "aot", "joint", "post-grad"


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph before the function did.

    Attributes:
        reason: Dynamo's first line. explanation: its second.
        where: file, line and function of the user's code, without the folder.
    """

    reason: str
    explanation: str = ""
    where: str = ""

    @classmethod
    def of(cls, text: str | None, stack: Sequence[FrameSummary] = ()) -> GraphBreak | None:
        """Dynamo's text and the stack of the user's code, outermost first; None for no text."""
        if text is None:
            return None
        first, *more = text.splitlines() or [""]
        explanations = [line.partition("Explanation:")[2].strip() for line in more if "Explanation:" in line]
        frame = stack[-1] if stack else None
        where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" if frame else ""
        return cls(first.strip(), next(iter(explanations), ""), where)

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.reason)))


@dataclass(frozen=True)
class GeneratedCode:
    """One program that Inductor generated.

    Attributes:
        text: Python, with the source of its kernels in it.
        handles: names of post-grad nodes by the handle of the call that computes them, see
            ``inspect.kernels``.
    """

    text: str
    handles: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        weights: in the order of their first use.
        plain: linears on weights that are not MXFP8.
        stages: lines of the graph by stage. "before" and "after" are Dynamo's graph as it came and after the
            lowering; "post-grad" are the ATen graphs Inductor generated code from (forward, backward), as far
            as they were generated and did not come from a cache; ``lowering.explain`` adds "aot" and "joint".
        code: what Inductor generated (``lowering.explain`` and ``lowering.capture``).
        graph_break: why the graph ends, None if the function does.
        seconds: spent in "passes" (all that the lowering adds to a compile), to "dequantize" (making the
            inputs that the fold adds), and in "total", which is the lowering and Inductor without Dynamo.
    """

    weights: list[WeightReport] = field(default_factory=list)
    plain: list[PlainLinear] = field(default_factory=list)
    stages: dict[str, list[list[Line]]] = field(default_factory=dict)
    code: list[GeneratedCode] = field(default_factory=list)
    graph_break: GraphBreak | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list, repr=False)
    """Names of the inputs of the graph that was compiled, in order."""
    owners: Owners = field(default_factory=Owners, repr=False)
    constants: list[tuple[WeightReport, weakref.ref[Tensor]]] = field(default_factory=list, repr=False)
    """Weights that Dynamo made constants of the graph, which freezing may fold; weakly, a report keeps no model."""
    labels: list[tuple[weakref.ref[Tensor], str]] = field(default_factory=list, repr=False)
    """Names of tensors that may become constants of the graph."""

    @property
    def before(self) -> str:
        """Text of Dynamo's graph as it came."""
        return self._text(BEFORE)

    @property
    def after(self) -> str:
        """Text of the same graph after the lowering."""
        return self._text(AFTER)

    @property
    def post_grad(self) -> list[str]:
        """Texts of the graphs Inductor generated code from."""
        return ["\n".join(map(str, lines)) for lines in self.stages.get(POST_GRAD, ())]

    @property
    def from_cache(self) -> bool:
        """Whether Inductor found the generated code on disk: then there is no post-grad graph."""
        return POST_GRAD not in self.stages and any(line.target for line in self.lines(AFTER))

    def lines(self, stage: str) -> list[Line]:
        """All lines of a stage."""
        return [line for lines in self.stages.get(stage, ()) for line in lines]

    def _text(self, stage: str) -> str:
        return "\n".join(map(str, self.lines(stage)))

    def add_stage(self, stage: str, lines: list[Line]) -> None:
        """Adds the text of a graph, and takes from it what computes with each weight."""
        self.stages.setdefault(stage, []).append(lines)
        if stage not in (AFTER, POST_GRAD):
            return
        calls: dict[str, list[str]] = {}
        for line in lines:
            if line.reads or line.target.startswith("mxfp8."):
                for weight in line.weights:
                    calls.setdefault(weight, []).append(line.target)
        for row in self.weights:
            if row.name in calls:
                row.kernel = " + ".join(dict.fromkeys(kernel_text(c, row.device) for c in calls[row.name]))

    def record(self, stage: str, graph: fx.Graph) -> None:
        """Adds an ATen graph, whose inputs get the names they have in Dynamo's."""
        if graph.owning_module is not None:
            self.add_stage(
                stage, graph_lines(graph.owning_module, self.owners, self._aten_name, introspection.source_nodes)
            )

    def _aten_name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            position = introspection.input_position(node)
            known = position is not None and position < len(self.inputs)
            return self.inputs[position] if known and position is not None else node.name
        constant = getattr(node.graph.owning_module, str(node.target), None)
        if isinstance(constant, Tensor):
            for ref, label in self.labels:
                tensor = ref()
                if tensor is not None and introspection.same_memory(tensor, constant):
                    return label
        return leaf_name(node)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time the block takes to ``seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def mark_frozen(self, weight: Tensor, value: Tensor, form: Form, dtype: torch.dtype) -> None:
        """Notes that freezing made ``value`` of the constant ``weight``, for x of that dtype."""
        for each, ref in self.constants:
            tensor = ref()
            if tensor is not None and (tensor is weight or tensor.data_ptr() == weight.data_ptr()):
                each.add_made(form, value.nbytes, how="frozen, ")
                each.kernel = kernel_text(form.target, each.device)  # until the post-grad graph tells
                if isinstance(form, Packed):
                    each.packed = weakref.ref(value)
                    each.decoding.setdefault(dtype_name(dtype), PENDING)
                label = f"{each.name}.{form.word}"
                self.labels.append((weakref.ref(value), label))
                self.owners.add(each.name, label, label)

    def read_decoding(self) -> None:
        """Says of packed weights how they are decoded. Reading that waits for their device, so it is done when
        somebody asks for the report, and not while the graph is compiled.
        """
        for row in self.weights:
            row.read_decoding()

    def __str__(self) -> str:
        self.read_decoding()
        return format_table(self.weights)


# --- who is listening ----------------------------------------------------------------------------------------

_lock = threading.Lock()
_recent: deque[GraphReport] = deque(maxlen=256)
_collectors: list[tuple[list[GraphReport], int | None]] = []
_thread = threading.local()


def recent() -> list[GraphReport]:
    """The newest reports of this process, oldest first (at most 256)."""
    with _lock:
        graphs = list(_recent)
    for graph in graphs:
        graph.read_decoding()
    return graphs


@contextlib.contextmanager
def collect(into: list[GraphReport] | None = None, thread: int | None = None) -> Iterator[list[GraphReport]]:
    """Collects the reports of all graphs compiled inside the ``with`` block, in any thread or in the one named."""
    graphs: list[GraphReport] = [] if into is None else into
    with _lock:
        _collectors.append((graphs, thread))
    try:
        yield graphs
    finally:
        with _lock:
            _collectors[:] = [each for each in _collectors if each[0] is not graphs]
    for graph in graphs:
        graph.read_decoding()


def publish(graph: GraphReport) -> None:
    """Adds a graph, and makes it the one that this thread's later passes complete."""
    _thread.current = graph
    with _lock:
        _recent.append(graph)
        for graphs, thread in _collectors:
            if thread in (None, threading.get_ident()):
                graphs.append(graph)


def current() -> GraphReport | None:
    """The graph this thread is compiling, or compiled last."""
    return getattr(_thread, "current", None)


def log_graph(graph: GraphReport) -> None:
    """Writes one graph to the log, a line for each weight, and to torch's trace."""
    if log.isEnabledFor(logging.INFO):
        graph.read_decoding()
    for weight in graph.weights:
        shape, size = list(weight.shape), (weight.bytes_before, weight.bytes_after)
        log.info("%s %s %s: %d -> %d bytes (%s)", weight.action, weight.name, shape, *size, weight.reason)
    if graph.graph_break is not None:
        log.info("the graph ends at a graph break: %s", graph.graph_break)
    if graph.from_cache:
        log.info("cache hit: the generated code was found on disk")
    log.info("passes took %.4f of %.2f s", graph.seconds.get("passes", 0.0), graph.seconds.get("total", 0.0))
    if log.isEnabledFor(logging.DEBUG):
        log.debug("before:\n%s\nafter:\n%s", graph.before, graph.after)
    introspection.trace_artifact("mxfp8_before", lambda: graph.before)
    introspection.trace_artifact("mxfp8_after", lambda: graph.after)
    introspection.trace_artifact("mxfp8_report", lambda: str(graph))


def distinct(graphs: Iterable[GraphReport]) -> list[WeightReport]:
    """The weights of several graphs, each once, as the newest graph left it. One tensor is one weight, whatever
    names it has; of tensors that are gone the name and shape decide.
    """
    weights: dict[object, WeightReport] = {}
    for graph in graphs:
        for weight in graph.weights:
            key = weight.identity.key() if weight.identity is not None else None
            weights[key or (weight.name, weight.shape)] = weight
    return list(weights.values())
