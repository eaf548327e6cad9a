"""Graphs as text: short, the same for equal graphs, and the same on every torch version we support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._dtype_abbrs import dtype_abbrs

from .graph import StaticView, called, leaf_name, static_view, sub_graphs, value_of

Names = Callable[[fx.Node], str]
"""The name of a graph's input or constant."""
Sources = Callable[[fx.Node], tuple[str, ...]]
"""The nodes another node was made from."""


def _no_sources(node: fx.Node) -> tuple[str, ...]:
    return ()


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Line:
    """One line of a graph's text.

    Attributes:
        text: as in ``graph_lines``.
        node: the node's own name in torch's graph, "" for the closing line.
        weights: the MXFP8 weights the node stands for or reads.
        reads: whether it uses their values, as opposed to being an input, a view, a cast or a dequant of them.
        target: what the node calls, "" for inputs and constants.
        sources: of a node of an ATen graph, the nodes of Dynamo's graph it comes from, as far as is known.
    """

    text: str
    node: str = ""
    weights: tuple[str, ...] = ()
    reads: bool = False
    target: str = ""
    sources: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


class Owners:
    """Which tensors belong to which weight.

    Attributes:
        exact: names of tensors and of views of them (``experts[3]``, its scale, its dequantized value), and
            the weights they belong to.
        leaves: names of graph inputs, and the weights that are made of them, views included.
    """

    def __init__(self) -> None:
        self.exact: dict[str, tuple[str, ...]] = {}
        self.leaves: dict[str, tuple[str, ...]] = {}

    def add(self, weight: str, tensor: str, leaf: str) -> None:
        """Notes that ``tensor``, made of the graph input ``leaf``, belongs to ``weight``."""
        for names, name in ((self.exact, tensor), (self.leaves, leaf)):
            if weight not in names.get(name, ()):
                names[name] = (*names.get(name, ()), weight)


def graph_lines(
    gm: fx.GraphModule, owners: Owners | None = None, names: Names = leaf_name, sources: Sources = _no_sources
) -> list[Line]:
    """One line a node: ``linear_1: bf16[8, 96] = mxfp8.linear(relu, 2.weight, 2.weight_scale, 2.bias)``.

    Inputs carry the names of their parameters. Nodes are named after what they call, and numbered, since
    torch's own names vary. Sub-graphs of higher-order operators follow, indented.
    """
    return _Printer(gm, owners or Owners(), names, sources, {}).lines()


class _Printer:
    """Prints one graph module. ``bound`` has the weights of a sub-graph's placeholders, by position."""

    def __init__(
        self,
        gm: fx.GraphModule,
        owners: Owners,
        names: Names,
        sources: Sources,
        bound: dict[int, tuple[str, ...]],
    ) -> None:
        self.gm, self.owners, self.leaf_name, self.sources, self.bound = gm, owners, names, sources, bound
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = set()
        self.numbers: dict[str, int] = {}
        self.weights: dict[fx.Node, tuple[str, ...]] = {}

    def lines(self) -> list[Line]:
        result: list[Line] = []
        position = 0
        for node in self.gm.graph.nodes:
            if node.op == "output":
                result.append(Line(f"return {_format(node.args[0], self.names)}"))
                continue
            is_leaf = node.op in ("placeholder", "get_attr")
            name = self.names[node] = self._unique(self.leaf_name(node) if is_leaf else _target(node))
            declaration = f"{name}{_type(value_of(node))}"
            if is_leaf:
                weights = self.bound.get(position, ()) if node.op == "placeholder" else ()
                position += node.op == "placeholder"
                weights = self.weights[node] = weights or self._leaf_weights(node)
                kind = "input" if node.op == "placeholder" else "constant"
                result.append(Line(f"{kind} {declaration}", node.name, weights))
                result += self._nested(node)
            else:
                arguments = [_format(each, self.names) for each in node.args]
                arguments += [f"{key}={_format(each, self.names)}" for key, each in node.kwargs.items()]
                weights, reads = self._weights_of_call(node)
                text = f"{declaration} = {_qualified(node)}({', '.join(arguments)})"
                result.append(Line(text, node.name, weights, reads, _qualified(node), self.sources(node)))
        return result

    def _unique(self, base: str) -> str:
        name, number = base, self.numbers.get(base, 0)
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.numbers[base] = number
        self.taken.add(name)
        return name

    # --- which weights a node stands for or reads ---------------------------------------------------------

    def _leaf_weights(self, node: fx.Node) -> tuple[str, ...]:
        name = self.leaf_name(node)
        return self.owners.exact.get(name) or self.owners.leaves.get(name, ())

    def _weights_of_call(self, node: fx.Node) -> tuple[tuple[str, ...], bool]:
        """A node computed from a weight alone still stands for it; the first that mixes it with anything
        else reads it.
        """
        view = static_view(node)
        exact = self.owners.exact.get(self._view_name(view)) if view is not None else None
        inputs = [each for each in node.all_input_nodes if not self._is_sub_graph(each)]
        weights = exact or tuple(dict.fromkeys(w for each in inputs for w in self.weights.get(each, ())))
        if not weights:
            return (), False
        alone = all(self.weights.get(each) for each in inputs)
        if alone and sub_graphs(node) is None:
            self.weights[node] = weights
        return weights, not alone and sub_graphs(node) is None

    def _view_name(self, view: StaticView) -> str:
        return self.leaf_name(view.leaf) + view.text

    def _is_sub_graph(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and isinstance(getattr(self.gm, str(node.target), None), fx.GraphModule)

    def _nested(self, node: fx.Node) -> list[Line]:
        if not self._is_sub_graph(node):
            return []
        bound: dict[int, tuple[str, ...]] = {}
        for call in node.users:
            found = sub_graphs(call)
            for position, operand in enumerate(found.operands if found else ()):
                of_operand = self._operand_weights(operand)
                bound[position] = tuple(dict.fromkeys((*bound.get(position, ()), *of_operand)))
        inner = _Printer(getattr(self.gm, str(node.target)), self.owners, self.leaf_name, self.sources, bound)
        return [replace(line, text=f"    {line}") for line in inner.lines()]

    def _operand_weights(self, operand: object) -> tuple[str, ...]:
        view = static_view(operand)
        if view is None:
            return ()
        return self.owners.exact.get(self._view_name(view)) or self.weights.get(view.leaf, ())


def _target(node: fx.Node) -> str:
    name = called(node)
    return name if isinstance(node.target, torch._ops.OpOverload) else name.strip("_")


def _qualified(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return f".{node.target}" if node.op == "call_method" else _target(node)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f": {dtype_abbrs.get(value.dtype, value.dtype)}[{', '.join(map(str, value.shape))}]"
    return ""


def _format(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_format(each, names) for each in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return str(value)
