"""Several linears on the same x as one: q, k and v, gate and up.

before: ``q = mxfp8.linear(x, q_weight, q_scale, None); k = mxfp8.linear(x, k_weight, k_scale, None)``
after:  ``q, k = mxfp8.linear_packed(x, rows_of_both, n, None).split((q_n, k_n), -1)``

Each reads so few bytes that a kernel for all of them takes hardly longer than for one. Biases are joined in every call.
The results are views of one tensor, so they are not contiguous.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import compat
from .graph import arguments, called, is_linear, value_of
from .writes import returned_storages, storages, written_storages

_LEAVES = ("placeholder", "get_attr")
"""What is there before the first call."""


def groups(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The calls of ``mxfp8::linear`` among ``nodes`` that one call can replace, as many as there are for each x."""
    by_x: dict[tuple[Any, ...], list[fx.Node]] = {}
    if not nodes:
        return
    graph = nodes[0].graph
    written, returned, stretches = written_storages(graph), returned_storages(graph), _stretches(graph)
    for node in filter(is_linear, nodes):
        x, _, _, bias = arguments(node, "x", "weight", "scale", "bias")
        result = value_of(node)
        if not isinstance(result, Tensor) or (bias is not None and bias.op not in _LEAVES):
            continue
        if (storages(x) | storages(bias)) & written or storages(node) & (written | returned):
            continue
        if _may_be_a_slice(node):
            by_x.setdefault((x, result.dtype, _dtype(bias), stretches[node]), []).append(node)
    yield from (group for group in by_x.values() if len(group) > 1)


def _dtype(bias: fx.Node | None) -> torch.dtype | None:
    return None if bias is None else value_of(bias).dtype


def _stretches(graph: fx.Graph) -> dict[fx.Node, int]:
    """Numbers the nodes anew after every call with an effect, such as that of ``no_grad`` and ``autocast``."""
    found, number = {}, 0
    for node in graph.nodes:
        number += node.is_impure()
        found[node] = number
    return found


def _may_be_a_slice(node: fx.Node) -> bool:
    """Whether the views that are taken of a result can be taken of a slice of a larger one, too."""
    result = value_of(node)
    *leading, n = result.shape
    with compat.without_guards(result):
        return _views_work(node, result.new_empty((*leading, n + 1))[..., :n])


def _views_work(node: fx.Node, value: Any) -> bool:
    own = storages(node)
    for user in node.users:
        if isinstance(user.target, torch._ops.HigherOrderOperator) or _is_custom(user.target):  # may take any view
            return False
        if not own & storages(user):
            continue
        if called(user) == "as_strided" or user.op not in ("call_method", "call_function"):
            return False
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda each: value if each is node else value_of(each))
        function = user.target if callable(user.target) else getattr(type(args[0]), str(user.target))
        try:
            view = function(*args, **kwargs)
        except (RuntimeError, ValueError):  # such as those of view, which needs neighbours in memory
            return False
        if not _views_work(user, view):
            return False
    return True


def _is_custom(target: object) -> bool:
    """Whether a call is of an operator that is neither torch's nor ours, and does not say that it takes any strides."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    else:
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else []
    return any(
        each.namespace not in ("aten", "prims", "prim", "mxfp8") and torch.Tag.flexible_layout not in each.tags
        for each in overloads
    )


def replace(group: Sequence[fx.Node], value: fx.Node, call: Any, more: tuple[Any, ...]) -> None:
    """Puts one call, ``call(x, value, *more, bias)`` on a value that has the rows of all weights, in the place of the
    first, and its parts in the place of each.
    """
    first, graph = group[0], group[0].graph
    x = arguments(first, "x")[0]
    biases = [arguments(node, "x", "weight", "scale", "bias")[3] for node in group]
    results = [value_of(node) for node in group]
    sizes = [result.shape[-1] for result in results]
    with graph.inserting_before(first):
        bias = None if biases[0] is None else _joined(graph, biases)
        whole = graph.call_function(call, (x, value, *more, bias))
        parts = graph.call_method("split", (whole, sizes, -1))
        each = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(group))]
    example = results[0].new_empty((*results[0].shape[:-1], sum(sizes)))
    for node, part, slice_ in zip(group, each, example.split(sizes, -1), strict=True):
        part.meta = node.meta | {"example_value": slice_}
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    whole.meta = first.meta | {"example_value": example}
    parts.meta = first.meta | {"example_value": example.split(sizes, -1)}


def _joined(graph: fx.Graph, biases: Sequence[fx.Node]) -> fx.Node:
    node = graph.call_function(torch.cat, (list(biases),))
    node.meta["example_value"] = value_of(biases[0]).new_empty(sum(value_of(each).shape[0] for each in biases))
    return node
