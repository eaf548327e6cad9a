"""What was done to each weight, and why: a row of the report, what all rows take, and a table of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mxfp8_ops import ops
from mxfp8_ops.packing import exact_marks

from .forms import Dequantized, Form
from .graph import Steps, viewed
from .text import dtype_name

FOLDED = "folded"
KEPT = "kept"
UNMATCHED = "unmatched"
ACTIONS = (FOLDED, KEPT, UNMATCHED)

FAST, EXACT, DEQUANTIZED, UNKNOWN, PENDING = "fast", "exact", "dequantized", "unknown", ""
"""How the kernels of GPUs decode a packed weight; ``PENDING`` until it is read."""

_lock = threading.Lock()


@dataclass(frozen=True)
class Identity:
    """Which tensor a weight is, whatever its name in a graph: the parameter, and the view taken of it."""

    tensor: weakref.ref[Tensor]
    view: str = ""
    steps: Steps = field(default=(), compare=False, repr=False)

    def key(self) -> tuple[int, str] | None:
        """None once the tensor is gone."""
        tensor = self.tensor()
        return None if tensor is None else (id(tensor), self.view)

    def value(self) -> Tensor | None:
        """The view, None where there is no data (any more)."""
        tensor = self.tensor()
        if tensor is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            return None
        return viewed(tensor, self.steps)


@dataclass
class WeightReport:
    """One MXFP8 weight of a graph.

    Attributes:
        name: dotted path of the weight, from the compiled module or function on.
        shape: of the weight.
        action: "folded" (a dequantized copy stands in the graph), "kept" (``mxfp8::linear`` or ``linear_packed``
            reads the 1-byte weight) or "unmatched" (it is dequantized in every call, by the operator or by other code).
        reason: how it was folded, or why it was not.
        bytes_before: of weight and scale; of a packed weight with its padding.
        bytes_after: of everything held for this weight after the compile: the dequantized copies, and the
            quantized bytes unless they were released.
        kernel: what computes with it, as far as is known: the call in the generated code, else in the graph.
        bytes_dequantized: of the dequantized copies. bytes_packed: of the packed one.
        device: where it is.
        decoding: of a packed weight, by x's dtype: how the kernels of GPUs decode it, "fast", "exact" (some codes
            need that), "dequantized" (as a whole, in every call) or "unknown" (its data was not at hand).
    """

    name: str
    shape: tuple[int, ...]
    action: str
    reason: str
    bytes_before: int
    bytes_after: int
    kernel: str = ""
    bytes_dequantized: int = field(default=0, compare=False)
    bytes_packed: int = field(default=0, compare=False)
    device: str = field(default="cpu", compare=False)
    decoding: dict[str, str] = field(default_factory=dict)
    identity: Identity | None = field(default=None, compare=False, repr=False)
    packed: weakref.ref[Tensor] | None = field(default=None, compare=False, repr=False)
    """The packed copy, of which this weight may be a part."""

    def add_made(self, form: Form, nbytes: int, others: Sequence[str] = (), how: str = "") -> None:
        """Counts a copy in another form, and says so after ``how``; ``others``: the weights that it holds besides."""
        self.bytes_after += nbytes
        merged = f", one linear with {', '.join(others)}" if others else ""
        if isinstance(form, Dequantized):
            first = self.action != FOLDED
            self.reason = f"{how}{form}{merged}" if first else f"{self.reason}, {dtype_name(form.dtype)}{merged}"
            self.action = FOLDED
            self.bytes_dequantized += nbytes
        else:
            self.reason = f"{self.reason}{merged or ', and alone'}" if self.bytes_packed else f"{how}at load{merged}"
            self.bytes_packed += nbytes

    def _packed(self) -> Tensor | None:
        if self.packed is not None:
            return self.packed()
        return None if self.identity is None else self.identity.value()

    def read_decoding(self) -> None:
        """Says how a packed weight is decoded, once: its data tells, see ``mxfp8_ops.packing``."""
        with _lock:
            if PENDING not in self.decoding.values():
                return
            known = {"bfloat16": UNKNOWN, "float16": UNKNOWN, "float32": DEQUANTIZED}
            kernel = ops.kernel_name("linear_packed", torch.device(self.device))
            if ops.DEQUANTIZED in kernel:  # by chips that have no kernels for packed weights
                known = dict.fromkeys(known, DEQUANTIZED)
            else:
                with torch.utils._python_dispatch._disable_current_modes():
                    packed = self._packed()
                    if packed is not None:
                        known["bfloat16"], known["float16"] = (EXACT if mark else FAST for mark in exact_marks(packed))
            self.decoding = {name: known[name] for name in self.decoding}
            words = ", ".join(_DECODING[how].format(name) for name, how in self.decoding.items())
            if kernel == "reference":
                words += " (on GPUs; here unpacked in every call)"
            self.reason = f"packed, {words}; {self.reason}"


_DECODING = {
    FAST: "fast decoding for {}",
    EXACT: "exact decoding for {}, which some codes need",
    DEQUANTIZED: f"{ops.DEQUANTIZED} for {{}}",
    UNKNOWN: "decoding unknown for {}",
}


@dataclass(frozen=True)
class PlainLinear:
    """A linear whose weight is not MXFP8."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def kernel_text(target: str, device: str) -> str:
    """What a call runs: of our operators the kernel behind it, which depends on the device."""
    name = target.removeprefix("mxfp8.")
    if name == target:
        return target
    return "dequant loop" if name == "dequant_loop" else f"{target} ({ops.kernel_name(name, torch.device(device))})"


# --- all of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of MXFP8 weights, scales and dequantized copies, without scratch memory: before the compile, at
    most while weights were dequantized one after another, and after it.
    """

    before: int
    peak: int
    after: int


def memory(weights: Iterable[WeightReport]) -> Memory:
    """What the weights take, when they are dequantized in this order and each released before the next one."""
    weights = list(weights)
    before = held = peak = sum(weight.bytes_before for weight in weights)
    for weight in weights:
        peak = max(peak, held + weight.bytes_dequantized + weight.bytes_packed)
        held += weight.bytes_after - weight.bytes_before
    return Memory(before, peak, held)


def format_table(weights: Iterable[WeightReport]) -> str:
    """A plain-text table with totals, for terminals and pipes alike."""
    weights = list(weights)
    header = ("weight", "shape", "action", "bytes before", "bytes after", "kernel", "reason")
    rows = [
        (w.name, "x".join(map(str, w.shape)), w.action, f"{w.bytes_before:,}", f"{w.bytes_after:,}", w.kernel, w.reason)
        for w in weights
    ]
    before, after = (sum(sizes) for sizes in ([w.bytes_before for w in weights], [w.bytes_after for w in weights]))
    total = f"total: {len(rows)} weight{'s' * (len(rows) != 1)}"
    rows.append((total, "", "", f"{before:,}", f"{after:,}", "", ""))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numeric = (3, 4)

    def line(row: tuple[str, ...]) -> str:
        cells = (c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows[:-1]), rule, line(rows[-1])])
