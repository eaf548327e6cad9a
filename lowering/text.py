"""Graphs as text: short, the same for equal graphs, and the same on every torch version we support."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._dtype_abbrs import dtype_abbrs

from .graph import leaf_name, value_of
from .report import dtype_name


def graph_text(gm: fx.GraphModule) -> str:
    """One line a node: ``linear_1: bf16[8, 96] = mxfp8.linear(relu, 2.weight, 2.weight_scale, 2.bias)``.

    Inputs carry the names of their parameters. Nodes are named after what they call, and numbered, since
    torch's own names vary. Sub-graphs of higher-order operators follow, indented.
    """
    names: dict[fx.Node, str] = {}
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_format(node.args[0], names)}")
            continue
        name = names[node] = _unique(
            leaf_name(node) if node.op in ("placeholder", "get_attr") else _target(node), names
        )
        declaration = f"{name}{_type(value_of(node))}"
        if node.op == "placeholder":
            lines.append(f"input {declaration}")
        elif node.op == "get_attr":
            sub = getattr(gm, str(node.target), None)
            lines.append(f"constant {declaration}")
            if isinstance(sub, fx.GraphModule):
                lines += [f"    {line}" for line in graph_text(sub).splitlines()]
        else:
            arguments = [_format(each, names) for each in node.args]
            arguments += [f"{key}={_format(each, names)}" for key, each in node.kwargs.items()]
            lines.append(f"{declaration} = {_qualified(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def _unique(base: str, names: dict[fx.Node, str]) -> str:
    taken = set(names.values())
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    if isinstance(node.target, str):
        return node.target.strip("_")
    return getattr(node.target, "__name__", str(node.target)).strip("_")


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
