"""Reading Dynamo's graphs: which calls are MXFP8, what their weights are made of, what may change them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mxfp8_ops import ops, packed
from mxfp8_ops.format import COMPUTE_DTYPES

from . import compat

_PLAIN_LINEAR = {F.linear, torch.ops.aten.linear, torch.ops.aten.linear.default}
_LINEAR = {ops.linear, torch.ops.mxfp8.linear}
_LINEAR_PACKED = {packed.linear_packed, torch.ops.mxfp8.linear_packed}
_DEQUANT = {ops.dequant, torch.ops.mxfp8.dequant}
_CASTS = {"float": torch.float32, "bfloat16": torch.bfloat16, "half": torch.float16}


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


# --- F.linear(x, dequant(w, s)) is linear(x, w, s) --------------------------------------------------------


def recognise_all(gm: fx.GraphModule) -> int:
    """``recognise`` in the graph and in the sub-graphs of its higher-order operators; returns how many."""
    return sum(recognise(module.graph) for module in gm.modules() if isinstance(module, fx.GraphModule))


def recognise(graph: fx.Graph) -> int:
    """Rewrites plain linears on a dequantized weight into ``mxfp8::linear``; returns how many.

    before: ``w = mxfp8.dequant(weight, scale, bfloat16); w = w.to(float16); y = linear(x, w, bias)``
    after:  ``y = mxfp8.linear(x, weight, scale, bias)``

    Only where both round alike: ``mxfp8::linear`` rounds the exact value once to its own dtype. So
    ``dequant(..., bfloat16).to(float32)``, which rounds scale bytes below 3 to bfloat16 first, stays as it is.
    """
    count = 0
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
        if len(shape) != 2:
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


# --- what changes, and what leaves ------------------------------------------------------------------------

_AUGMENTED_ASSIGNMENTS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv}
_AUGMENTED_ASSIGNMENTS |= {operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior}
_AUGMENTED_ASSIGNMENTS |= {operator.ixor, operator.ilshift, operator.irshift, operator.iconcat}


def storages(node: object) -> set[int]:
    """Identities of the storages behind a node's value: nodes that share one are views of each other."""
    tensors = torch.utils._pytree.tree_leaves(value_of(node))
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}


def written_storages(graph: fx.Graph) -> set[int]:
    """Storages that some node of the graph writes, or may write as far as can be told."""
    return {storage for node in graph.nodes for target in _written(node) for storage in storages(target)}


def returned_storages(graph: fx.Graph) -> set[int]:
    """Storages that leave the graph with its outputs."""
    return {storage for node in graph.output_node().all_input_nodes for storage in storages(node)}


def _written(node: fx.Node) -> Iterator[object]:
    if "out" in node.kwargs:
        yield node.kwargs["out"]
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        if sub_graphs(node) is None:
            yield from node.all_input_nodes
    elif isinstance(target, torch._ops.OpOverload):
        for argument, value in zip(target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield value
    elif node.op in ("call_method", "call_function") and node.args:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name in ("setitem", "__setitem__") or target in _AUGMENTED_ASSIGNMENTS:
            yield node.args[0]


# --- sub-graphs of higher-order operators -----------------------------------------------------------------


def sub_graphs(node: fx.Node) -> tuple[str, int] | None:
    """For an operator that calls one sub-graph on its operands: the sub-graph's attribute, and the position
    of the first operand. None for anything else.
    """
    name = getattr(node.target, "_name", None) or str(node.target)
    first = {"invoke_subgraph": 2, "tag_activation_checkpoint": 1}.get(name)
    if node.op != "call_function" or first is None or not isinstance(node.args[0], fx.Node):
        return None
    return str(node.args[0].target), first


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
