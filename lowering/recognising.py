"""``F.linear(x, dequant(w, s))`` is ``linear(x, w, s)``."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxfp8_ops import ops
from mxfp8_ops.format import COMPUTE_DTYPES

from .graph import arguments, is_dequant, is_plain_linear, value_of
from .writes import Writes

_CASTS = {"float": torch.float32, "bfloat16": torch.bfloat16, "half": torch.float16}


def recognise_all(gm: fx.GraphModule) -> int:
    """``recognise`` in the graph and in the sub-graphs of its higher-order operators; returns how many."""
    return sum(recognise(module.graph) for module in gm.modules() if isinstance(module, fx.GraphModule))


def recognise(graph: fx.Graph) -> int:
    """Rewrites plain linears on a dequantized weight into ``mxfp8::linear``; returns how many.

    before: ``w = mxfp8.dequant(weight, scale, bfloat16); w = w.to(float16); y = linear(x, w, bias)``
    after:  ``y = mxfp8.linear(x, weight, scale, bias)``

    Only where both round alike: ``mxfp8::linear`` rounds the exact value once to its own dtype. So
    ``dequant(..., bfloat16).to(float32)``, which rounds scale bytes below 3 to bfloat16 first, stays as it is. And only
    where nothing in between writes to any of these tensors.
    """
    if not any(map(is_dequant, graph.nodes)):
        return 0
    count = 0
    writes = Writes(graph)
    for node in list(graph.nodes):
        if not is_plain_linear(node):
            continue
        x, weight, bias = arguments(node, "input", "weight", "bias")
        result = value_of(node)
        found = _dequantized(weight)
        if found is None or not isinstance(result, Tensor) or result.dtype not in COMPUTE_DTYPES:
            continue
        dequant, dtype = found
        if not _rounds_alike(dtype, result.dtype):
            continue
        packed, scale, _ = arguments(dequant, "weight", "scale", "dtype")
        shape = getattr(value_of(packed), "shape", ())
        if len(shape) != 2 or writes.between(dequant, node, (packed, scale, dequant, weight)):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(ops.linear, (x, packed, scale, bias))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        _erase_unused(graph, weight)
        count += 1
    return count


def _dequantized(node: object) -> tuple[fx.Node, torch.dtype] | None:
    """The dequant a weight comes from through casts that lose nothing, and the dtype it then has."""
    if not isinstance(node, fx.Node):
        return None
    if is_dequant(node):
        return node, arguments(node, "weight", "scale", "dtype")[2]
    dtype = cast_to(node)
    inner = _dequantized(node.args[0]) if dtype is not None else None
    if inner is None or dtype is None or not _rounds_alike(inner[1], dtype):
        return None
    return inner[0], dtype


def cast_to(node: fx.Node) -> torch.dtype | None:
    """The dtype a node casts its input to, None if it is no cast."""
    if node.op != "call_method":
        return None
    if node.target in _CASTS and len(node.args) == 1:
        return _CASTS[node.target]
    if node.target in ("to", "type") and len(node.args) + len(node.kwargs) == 2:
        dtype = node.args[1] if len(node.args) == 2 else node.kwargs.get("dtype")
        return dtype if isinstance(dtype, torch.dtype) else None
    return None


def _rounds_alike(through: torch.dtype, to: torch.dtype) -> bool:
    """Whether dequant to ``through``, then a cast to ``to``, equals dequant to ``to`` for every code.

    float32 holds every value exactly. bfloat16 is inexact only for values that are 0 or inf in float16.
    """
    return through in (to, torch.float32) or (through, to) == (torch.bfloat16, torch.float16)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    while isinstance(node, fx.Node) and not node.users and (is_dequant(node) or cast_to(node) is not None):
        inner = node.args[0]
        graph.erase_node(node)
        node = inner  # type: ignore[assignment]
