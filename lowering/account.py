"""The account of one graph: what became of each MXFP8 weight, and which linears are none.

A weight that is not folded is "kept" where ``mxfp8::linear`` or ``linear_packed`` reads it. It is "unmatched" where
the operator ``mxfp8::dequant`` or other code dequantizes it in every call, and the account says why no linear was seen.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mxfp8_ops.format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE

from . import compat
from .forms import Packed
from .graph import (
    StaticView,
    arguments,
    called,
    is_dequant,
    is_linear_packed,
    is_plain_linear,
    is_view,
    leaf_name,
    leaves,
    static_view,
    value_of,
    view_name,
)
from .recognising import cast_to
from .report import GraphReport
from .slots import Pair, Request
from .text import dtype_name
from .weights import KEPT, PENDING, UNMATCHED, Identity, PlainLinear, WeightReport

Tensors = Callable[[fx.Node], Any]
"""The tensor behind a graph input, None where there is none to be had."""


class Account:
    """Writes the rows of a report while a graph is being folded.

    Args:
        report: which is filled.
        tensors: the tensors behind the graph's inputs.
    """

    def __init__(self, report: GraphReport, tensors: Tensors) -> None:
        self.report, self.tensors = report, tensors
        self.rows: dict[str, WeightReport] = {}

    # --- made at load -------------------------------------------------------------------------------------

    def made(
        self,
        request: Request,
        value: Tensor,
        dtypes: Sequence[torch.dtype],
        sizes: Sequence[int],
        held: Sequence[int],
    ) -> None:
        """Notes a value made of some weights.

        Args:
            dtypes: of x where it is used.
            sizes: bytes of each weight and scale. held: those of them that are still held.
        """
        shapes = [_shape(pair.weight(value_of(pair.weight.leaf))) for pair in request.pairs]
        names = [view_name(pair.weight) for pair in request.pairs]
        for i, (pair, shape, name) in enumerate(zip(request.pairs, shapes, names, strict=True)):
            before, after = (sum(each[2 * i : 2 * i + 2]) for each in (sizes, held))
            row = self.rows.get(name) or self._row(pair, shape, before, value.device)
            share = value.nbytes * shape[0] // sum(each[0] for each in shapes)
            row.add_made(request.form, share, [each for each in names if each != name])
            row.bytes_after -= before - after
            if isinstance(request.form, Packed):
                row.packed = weakref.ref(value)
                row.decoding |= dict.fromkeys(map(dtype_name, dtypes), PENDING)
            self.report.owners.add(name, request.label, request.label)

    # --- left ---------------------------------------------------------------------------------------------

    def left(self, node: fx.Node, pair: Pair | None, weight: Tensor, scale: Tensor, reason: str) -> WeightReport:
        """Notes a call of one of our operators that is not folded, and why. A packed weight is its own scale."""
        name = view_name(pair.weight) if pair else str(arguments(node, "x", "weight")[not is_dequant(node)])
        row, packed = self.rows.get(name), is_linear_packed(node)
        if row is None:
            shape = _shape_unpacked(node) if packed else _shape(weight)
            size = _nbytes(weight) if packed else _nbytes(weight) + _nbytes(scale)
            row = self._row(pair, shape, size, weight.device, name)
            if pair and pair.is_constant:
                self.report.constants.append((row, weakref.ref(self.tensors(pair.weight.leaf))))
        if packed:
            row.decoding.setdefault(dtype_name(value_of(node).dtype), PENDING)
        if not is_dequant(node):
            row.reason = row.reason or reason
        else:
            row.action, row.reason = UNMATCHED, f"{why_no_linear(node)}; not folded: {reason}"
        return row

    def written_out(self, graph: fx.Graph) -> None:
        """Notes static MXFP8 weights that no operator of ours reads: their dequantization is written out."""
        unread = [node for node in leaves(graph) if leaf_name(node) not in self.report.owners.leaves]
        scales = [node for node in unread if _dtype(node) in (SCALE_DTYPE, torch.float8_e8m0fnu)]
        for node in unread:
            scale = _scale_of(node, scales) if node.users else None
            if scale is None:
                continue
            weight, readers = value_of(node), ", ".join(dict.fromkeys(map(called, node.users)))
            row = self._row(
                Pair(StaticView(node), StaticView(scale)),
                _shape(weight),
                _nbytes(weight) + _nbytes(value_of(scale)),
                weight.device,
            )
            row.action = UNMATCHED
            row.reason = f"read by {readers}, no operator of this package: use mxfp8_ops.linear(x, weight, scale)"

    def plain_linears(self, graph: fx.Graph) -> None:
        """Notes linears on static weights that are not MXFP8."""
        seen = {each.name for each in self.report.plain}
        for node in graph.nodes:
            if not is_plain_linear(node):
                continue
            _, weight = arguments(node, "input", "weight")
            view, value = static_view(weight), value_of(weight)
            if view is not None and isinstance(value, Tensor) and (name := view_name(view)) not in seen:
                seen.add(name)
                plain = PlainLinear(name, _shape(value), dtype_name(value.dtype), _nbytes(value))
                self.report.plain.append(plain)

    # --- rows ---------------------------------------------------------------------------------------------

    def _row(
        self, pair: Pair | None, shape: tuple[int, ...], size: int, device: torch.device, name: str = ""
    ) -> WeightReport:
        identity = None
        if pair is not None:
            name = view_name(pair.weight)
            tensor = self.tensors(pair.weight.leaf)
            if isinstance(tensor, Tensor):
                identity = Identity(weakref.ref(tensor), pair.weight.text, pair.weight.steps)
            for view in (pair.weight, pair.scale):
                self.report.owners.add(name, view_name(view), leaf_name(view.leaf))
        row = WeightReport(name, shape, KEPT, "", size, size, device=str(device), identity=identity)
        self.rows[name] = row
        self.report.weights.append(row)
        return row


def _shape_unpacked(node: fx.Node) -> tuple[int, ...]:
    """``[N, K]`` of the weight of ``mxfp8::linear_packed``: its packed form does not tell."""
    (x,) = arguments(node, "x")
    value = value_of(x)  # torch 2.11 may have lost that of a constant, see compat.is_dynamo_graph
    values = value_of(node), getattr(x.graph.owning_module, str(x.target)) if value is None else value
    n, k = (_shape(each)[-1] for each in values)
    return n, k


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """As it is now: under dynamic shapes the sizes of a weight that is no parameter may be symbols."""
    return tuple(map(compat.size_hint, tensor.shape))


def _nbytes(tensor: Tensor) -> int:
    return math.prod(_shape(tensor)) * tensor.element_size()


def why_no_linear(dequant: fx.Node) -> str:
    """Why a call of ``mxfp8::dequant`` is no part of a linear."""
    dtype = arguments(dequant, "weight", "scale", "dtype")[2]
    users, node = list(dequant.users), dequant
    while len(users) == 1 and (to := cast_to(users[0])) is not None:
        node, users = users[0], list(users[0].users)
        if any(map(is_plain_linear, users)):
            return (
                f"rounded to {dtype_name(dtype)} before the cast to {dtype_name(to)}, unlike linear, which rounds "
                f"once: ask dequant for {dtype_name(to)}"
            )
    if any(user.op == "output" for user in users):
        return "dequantized in every call: the result leaves the graph"
    shape = getattr(value_of(dequant), "shape", ())
    if len(shape) != 2:
        return f"dequantized in every call for {_called_by(node)}: linear takes [N, K], not {len(shape)} dimensions"
    return f"dequantized in every call for {_called_by(node)}, which is not linear"


def _called_by(node: fx.Node) -> str:
    """What uses a node's value, looking through transposes and other views."""
    found: dict[str, None] = {}
    pending = list(node.users)
    for user in pending:
        if is_view(user) and user.all_input_nodes == [user.args[0]]:
            pending.extend(user.users)
        else:
            found[called(user)] = None
    return ", ".join(found)


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(value_of(node), "dtype", None)


def _scale_of(node: fx.Node, scales: Iterable[fx.Node]) -> fx.Node | None:
    """The scale that goes with a weight no operator reads: bytes of its shape, of the nearest name. None if
    the weight is not MXFP8.
    """
    weight = value_of(node)
    if not isinstance(weight, Tensor) or weight.dtype != ELEMENT_DTYPE or weight.dim() < 2:
        return None
    *rows, k = _shape(weight)
    fitting = [each for each in scales if _shape(value_of(each)) == (*rows, k // BLOCK_SIZE)]
    return max(fitting, key=lambda each: _common(leaf_name(node), leaf_name(each)), default=None)


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
