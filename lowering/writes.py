"""What the nodes of a graph write to, and what leaves it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .graph import sub_graphs, value_of

_AUGMENTED_ASSIGNMENTS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv}
_AUGMENTED_ASSIGNMENTS |= {operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior}
_AUGMENTED_ASSIGNMENTS |= {operator.ixor, operator.ilshift, operator.irshift, operator.iconcat}


def storages(nodes: object) -> set[int]:
    """Identities of the storages behind the value of a node, or of several in lists and tuples. Nodes that share one
    are views of each other.
    """
    tensors = [tensor for node in tree_leaves(nodes) for tensor in tree_leaves(value_of(node))]
    return {tensor.untyped_storage()._cdata for tensor in tensors if isinstance(tensor, Tensor)}


def written_storages(graph: fx.Graph) -> set[int]:
    """Storages that some node of the graph writes, or may write as far as can be told."""
    return set().union(*map(_written_by, graph.nodes))


def returned_storages(graph: fx.Graph) -> set[int]:
    """Storages that leave the graph with its outputs."""
    return storages(graph.output_node().all_input_nodes)


class Writes:
    """Which nodes of a graph, as it is now, write where."""

    def __init__(self, graph: fx.Graph) -> None:
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.found = [(i, written) for node, i in self.place.items() if (written := _written_by(node))]

    def between(self, first: fx.Node, last: fx.Node, nodes: object) -> bool:
        """Whether some node after ``first`` and before ``last`` may write to what one of ``nodes`` stands for."""
        after, before = self.place[first], self.place[last]
        near = [written for i, written in self.found if after < i < before]
        return bool(near) and not storages(nodes).isdisjoint(set().union(*near))


def _written_by(node: fx.Node) -> set[int]:
    return storages(list(_written(node)))


def _written(node: fx.Node) -> Iterator[object]:
    """The arguments that a node may write to."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        yield from _written_in_sub_graph(node)
    elif isinstance(target, torch._ops.OpOverload):
        yield from _written_by_schema(node, target._schema)
    elif isinstance(target, torch._ops.OpOverloadPacket):
        for overload in target.overloads():
            yield from _written_by_schema(node, getattr(target, overload)._schema)
    elif node.op in ("call_method", "call_function"):
        yield node.kwargs.get("out")
        yield from _written_by_name(node)


def _written_by_schema(node: fx.Node, schema: torch.FunctionSchema) -> Iterator[object]:
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)


def _written_by_name(node: fx.Node) -> Iterator[object]:
    """Of functions and methods without a schema: torch's names end with ``_`` where they write to their first argument,
    or they have an argument ``inplace``. (Functions whose names begin with ``_``, too, may write to others as well.)
    """
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    first = node.args[:1] or tuple(node.kwargs.values())
    if name.endswith("_") and not name.endswith("__"):
        yield node.args if name.startswith("_") else first
    elif name in ("setitem", "__setitem__") or target in _AUGMENTED_ASSIGNMENTS:
        yield first
    elif callable(target):
        given = dict(zip(_parameters(target), node.args, strict=False)) | dict(node.kwargs)
        if given.get("inplace"):
            yield first
        if given.get("max_norm") is not None:  # of an embedding
            yield given.get("weight")


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some are not written in Python
        return ()


def _written_in_sub_graph(node: fx.Node) -> Iterator[object]:
    """Operands whose placeholders a sub-graph writes to; all where none is known, or one cannot be seen."""
    found = sub_graphs(node)
    if found is None:
        yield node.all_input_nodes
        return
    for name in found.names:
        inner = getattr(node.graph.owning_module, name, None)
        if not isinstance(inner, fx.GraphModule):
            yield node.all_input_nodes
            return
        written = written_storages(inner.graph)
        for operand, placeholder in zip(found.operands, inner.graph.find_nodes(op="placeholder"), strict=False):
            if storages(placeholder) & written:
                yield operand
