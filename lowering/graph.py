"""Reading Dynamo's graphs: which calls are MXFP8, what their weights are made of."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mxfp8_ops import ops, packed

from . import compat

_PLAIN_LINEAR = {F.linear, torch.ops.aten.linear, torch.ops.aten.linear.default}
_LINEAR = {ops.linear, torch.ops.mxfp8.linear}
_LINEAR_PACKED = {packed.linear_packed, torch.ops.mxfp8.linear_packed}
_DEQUANT = {ops.dequant, torch.ops.mxfp8.dequant}


def is_linear(node: object) -> bool:
    """Whether a node calls ``mxfp8::linear``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _LINEAR


def is_linear_packed(node: object) -> bool:
    """Whether a node calls ``mxfp8::linear_packed``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _LINEAR_PACKED


def is_dequant(node: object) -> bool:
    """Whether a node calls ``mxfp8::dequant``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _DEQUANT


def is_plain_linear(node: object) -> bool:
    """Whether a node calls torch's own linear."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _PLAIN_LINEAR


def arguments(node: fx.Node, *names: str) -> list[Any]:
    """The arguments of a call by name, given by position or by keyword; None where absent."""
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]


def value_of(node: object) -> Any:
    """The fake value of a node: Dynamo calls it example_value, AOTAutograd val."""
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def called(node: fx.Node) -> str:
    """The name of what a node calls, without module and overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.split("::")[-1])
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def leaves(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, then the constants it reads."""
    return [*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")]


# --- static weights: views of one graph input -------------------------------------------------------------

_VIEW_METHODS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "t", "transpose", "permute"}
_VIEW_METHODS |= {"select", "narrow", "contiguous", "detach"}


def is_view(node: fx.Node) -> bool:
    """Whether a node makes a view of one tensor, by method, index or attribute (``.T``)."""
    if node.op == "call_method":
        return node.target in _VIEW_METHODS
    return node.op == "call_function" and node.target in (operator.getitem, getattr)


Steps: TypeAlias = tuple[tuple[Callable[..., Tensor], tuple[Any, ...], tuple[tuple[str, Any], ...]], ...]
"""Views taken one after the other: ``(function, other arguments, keyword arguments)`` each."""


def viewed(tensor: Tensor, steps: Steps) -> Tensor:
    """``tensor`` after these steps."""
    for function, args, kwargs in steps:
        tensor = function(tensor, *args, **dict(kwargs))
    return tensor


@dataclass(frozen=True)
class StaticView:
    """A tensor computed from one graph input by views: ``w``, ``experts[3]``, ``scale.view(uint8)``.

    Attributes:
        leaf: the placeholder or get_attr node.
        steps: the views, applied in order.
    """

    leaf: fx.Node
    steps: Steps = ()

    def __call__(self, tensor: Tensor) -> Tensor:
        return viewed(tensor, self.steps)

    @property
    def text(self) -> str:
        """Names the steps, as in ``[3].t()``: two views with one text do the same."""
        return "".join(_step_text(*step) for step in self.steps)

    def of(self, other: StaticView) -> StaticView:
        """This view, applied to another view's result instead of to its own leaf."""
        return StaticView(other.leaf, other.steps + self.steps)


def static_view(node: object) -> StaticView | None:
    """How a node follows from one graph input by views alone, None if it does not."""
    steps = []
    while isinstance(node, fx.Node) and node.op not in ("placeholder", "get_attr"):
        if node.op == "call_method" and node.target in _VIEW_METHODS:
            function = getattr(Tensor, node.target)
        elif node.op == "call_function" and node.target is operator.getitem:
            function = operator.getitem
        else:
            return None
        inner, *args = node.args
        if node.all_input_nodes != [inner]:
            return None
        steps.append((function, tuple(args), tuple(node.kwargs.items())))
        node = inner
    return StaticView(node, tuple(reversed(steps))) if isinstance(node, fx.Node) else None


def _step_text(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> str:
    if function is operator.getitem:
        indices = args[0] if isinstance(args[0], tuple) else args
        return f"[{', '.join(map(_index_text, indices))}]"
    given = [*map(str, args), *(f"{name}={value}" for name, value in kwargs)]
    return f".{function.__name__}({', '.join(given)})"


def _index_text(index: object) -> str:
    if not isinstance(index, slice):
        return str(index)
    parts = ["" if each is None else str(each) for each in (index.start, index.stop, index.step)]
    return ":".join(parts if parts[2] else parts[:2])


# --- sub-graphs of higher-order operators -----------------------------------------------------------------


_OPERANDS_LAST = {"invoke_subgraph": 2, "tag_activation_checkpoint": 1}
"""Operators that call one graph, and the position of its first operand."""
CALLERS = (*_OPERANDS_LAST, "cond", "while_loop")
"""Operators that are known to call graphs."""


@dataclass(frozen=True)
class SubGraphs:
    """What a higher-order operator calls.

    Attributes:
        names: attributes of the graphs, each of which takes all operands.
        first: the position of the first operand among the call's arguments where they are its last ones, so that there
            may be more of them or fewer; None where they are not.
    """

    names: tuple[str, ...]
    operands: tuple[Any, ...]
    first: int | None = None


def sub_graphs(node: fx.Node) -> SubGraphs | None:
    """The graphs that an operator calls; None for one that is not known to call any."""
    if node.op != "call_function":
        return None
    name = getattr(node.target, "_name", None) or str(node.target)
    args: tuple[Any, ...] = node.args
    first = _OPERANDS_LAST.get(name)
    if first is not None and isinstance(args[0], fx.Node):
        return SubGraphs((str(args[0].target),), args[first:], first)
    if name == "cond":
        _, *graphs, operands = args
    elif name == "while_loop":
        *graphs, carried, more = args
        operands = (*carried, *more)
    else:
        return None
    return SubGraphs(tuple(str(graph.target) for graph in graphs), tuple(operands))


# --- names ------------------------------------------------------------------------------------------------


def view_name(view: StaticView) -> str:
    """A readable name of a view: ``experts.weight[3]``."""
    return leaf_name(view.leaf) + view.text


def leaf_name(node: fx.Node) -> str:
    """A readable name of a graph input: ``encoder.layer.0.weight`` for
    ``L['self']._modules['encoder']._modules['layer']._modules['0']._parameters['weight']``.
    """
    if "mxfp8_label" in node.meta:
        return str(node.meta["mxfp8_label"])
    name = compat.source_name(node)
    name = re.sub(r"^[LG]\['(\w+)'\]", lambda m: "" if m[1] in ("self", "fn") else m[1], name)
    name = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", name)
    name = re.sub(r"\['?([^'\]]+)'?\]", r".\1", name)
    return name.replace(".cell_contents", "").strip(".") or str(node.target)


def label_leaves(gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> None:
    """Settles the names of a graph's inputs and constants: those known for their tensors, by ``id``, else
    Dynamo's.
    """
    constants = [getattr(gm, str(node.target), None) for node in gm.graph.find_nodes(op="get_attr")]
    for node, tensor in zip(leaves(gm.graph), [*inputs, *constants], strict=True):
        node.meta["mxfp8_label"] = names.get(id(tensor)) or leaf_name(node)
