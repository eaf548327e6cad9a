"""The graphs of a compile, one within the other: which of them call MXFP8 operators, and how weights reach them.

A higher-order operator (a checkpoint, a loop, a branch) calls a sub-graph, maybe many times. Weights are operands of
that call, and so is a value that replaces a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .forms import Form
from .graph import (
    StaticView,
    SubGraphs,
    arguments,
    called,
    is_dequant,
    is_linear,
    is_linear_packed,
    static_view,
    sub_graphs,
    value_of,
)
from .slots import Pair
from .writes import returned_storages, written_storages


@dataclass
class Use:
    """One call of ``mxfp8::linear``, ``linear_packed`` or ``dequant`` in a graph."""

    node: fx.Node
    weight: fx.Node
    scale: fx.Node
    dtype: torch.dtype

    @staticmethod
    def all_in(graph: fx.Graph) -> Iterator[Use]:
        for node in list(graph.nodes):
            if is_linear(node):
                _, weight, scale = arguments(node, "x", "weight", "scale")
                dtype = getattr(value_of(node), "dtype", torch.float32)  # under autocast not x's dtype
                yield Use(node, weight, scale, dtype)
            elif is_linear_packed(node):
                _, packed = arguments(node, "x", "packed")
                yield Use(node, packed, packed, getattr(value_of(node), "dtype", torch.float32))  # scales are in it
            elif is_dequant(node):
                yield Use(node, *arguments(node, "weight", "scale", "dtype"))

    def pair(self) -> Pair | None:
        """Its weight and scale in terms of the graph's inputs, None if they are computed in the graph."""
        weight, scale = static_view(self.weight), static_view(self.scale)
        return None if weight is None or scale is None else Pair(weight, scale)

    def replace(self, value: fx.Node, form: Form) -> None:
        """Rewrites the call to one that reads ``value``."""
        graph, new = self.node.graph, value
        if is_linear(self.node):
            x, _, _, bias = arguments(self.node, "x", "weight", "scale", "bias")
            call, more = form.linear(value_of(self.weight).shape[0])
            with graph.inserting_before(self.node):
                new = graph.call_function(call, (x, value, *more, bias))
            new.meta = dict(self.node.meta)
        self.node.replace_all_uses_with(new)
        graph.erase_node(self.node)


@dataclass
class Level:
    """A graph module and its callers: the sub-graph of a higher-order operator may be called many times. Where it is to
    stay as it is, ``fixed`` names the operator that calls it.
    """

    gm: fx.GraphModule
    fixed: str = ""
    sites: list[Site] = field(default_factory=list)
    added: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.written = written_storages(self.gm.graph)
        self.returned = returned_storages(self.gm.graph)
        self.placeholders = self.gm.graph.find_nodes(op="placeholder")
        self.positions = {node: position for position, node in enumerate(self.placeholders)}

    def last_input(self) -> fx.Node:
        return next(reversed(self.added.values()), self.placeholders[-1])


@dataclass
class Site:
    """One call of a sub-graph: the calling graph, and the node."""

    caller: Level
    node: fx.Node

    @property
    def calls(self) -> SubGraphs:
        """As the call is now: operands come and go."""
        found = sub_graphs(self.node)
        assert found is not None
        return found

    def lift(self, called: Level, pair: Pair) -> Pair | None:
        """A weight and scale of the called graph in terms of the caller's inputs."""
        weight, scale = (self._lift(called, view) for view in (pair.weight, pair.scale))
        return None if weight is None or scale is None else Pair(weight, scale)

    def _lift(self, called: Level, view: StaticView) -> StaticView | None:
        if view.leaf not in called.positions:
            return None
        operand = static_view(self.calls.operands[called.positions[view.leaf]])
        return None if operand is None else view.of(operand)


def levels_below(level: Level) -> Iterator[Level]:
    """Sub-graphs of a graph, callers before the called."""
    subs: dict[str, Level] = {}
    for node in level.gm.graph.nodes:
        found = sub_graphs(node)
        if found is None:
            continue
        fixed = level.fixed or (called(node) if found.first is None else "")
        for name in found.names:
            if name not in subs:
                subs[name] = Level(getattr(level.gm, name))
            subs[name].fixed = subs[name].fixed or fixed
            subs[name].sites.append(Site(level, node))
    for sub in subs.values():
        yield sub
        yield from levels_below(sub)


def drop_folded_operands(level: Level) -> None:
    """Stops passing packed weights to a sub-graph that has their dequantized values now."""
    if not level.sites:
        return
    folded = {leaf for leaves, *_ in level.added for leaf in leaves}
    for leaf in folded:
        if leaf.users:
            continue
        position = level.placeholders.index(leaf)
        for site in level.sites:
            first = site.calls.first
            assert first is not None  # or nothing would have been folded
            args = list(site.node.args)
            del args[first + position]
            site.node.args = tuple(args)
        del level.placeholders[position]
        level.positions = {node: position for position, node in enumerate(level.placeholders)}
        level.gm.graph.erase_node(leaf)


def erase_unused_views(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_method", "call_function") and static_view(node) is not None:
            graph.erase_node(node)
