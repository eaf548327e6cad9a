"""Load-time transformations under freezing: Inductor patterns on constants.

before: ``y = mxfp8.linear(x, _frozen_weight, _frozen_scale, bias)``
after:  ``y = aten.addmm(bias, x, permute(_mxfp8_dequantized, [1, 0]))``, a constant of the graph, with the flag on;
        else, where that pays, ``y = mxfp8.linear_packed(x, _mxfp8_packed, n, bias)``

before: ``w = mxfp8.dequant(_frozen_weight, _frozen_scale, dtype)``
after:  ``_mxfp8_dequantized``

Applied while Inductor freezes a graph, before it packs constants for its own kernels, and only in compiles
that carry our passes. (Inductor's constant folder never touches ``mxfp8::dequant``: see ``mxfp8_ops.ops``.)
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx
from torch._inductor.fx_passes.freezing_patterns import register_freezing_graph_pattern
from torch._inductor.pattern_matcher import Arg, CallFunction, Match

from mxfp8_ops import ops, settings

from . import passes
from .forms import Form
from .graph import value_of
from .writes import returned_storages, storages


def _constant(node: fx.Node) -> Tensor | None:
    value = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return value if isinstance(value, Tensor) else None


def _form(match: Match) -> Form | None:
    """What the constant weight of a call is to become, None if it is to stay as it is."""
    ours, node = passes.active(), match.output_node()
    if ours is None or not settings.passes():
        return None
    weight, scale = match.args[1:3] if node.target is ops.linear else match.args[:2]
    packed = _constant(weight)
    if packed is None or _constant(scale) is None:
        return None
    # A constant handed out by the graph could be written to by whoever receives it.
    if node.target is not ops.linear and storages(node) & returned_storages(match.graph):
        return None
    return ours.wanted.form(node, packed.device, value_of(node).dtype)


def _applies(match: Match) -> bool:
    return _form(match) is not None


def _made(match: Match, weight: fx.Node, scale: fx.Node) -> tuple[fx.Node, Form]:
    """The constant node that holds the weight in its form. One node serves every use of a weight: Inductor
    deletes an attribute together with any of its nodes.
    """
    graph, form = match.graph, _form(match)
    gm = graph.owning_module
    assert form is not None
    name = re.sub(r"\W", "_", f"_mxfp8_{form}_{weight.target}_{scale.target}")
    for node in graph.find_nodes(op="get_attr"):
        if node.target == name:
            return node, form
    quantized, scales = _constant(weight), _constant(scale)
    assert gm is not None
    assert quantized is not None
    assert scales is not None
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad(), torch.inference_mode(False):
        value = form.make(quantized.detach(), scales.detach(), None)
    gm.register_buffer(name, value)
    graph_report = passes.current_report()
    if graph_report is not None:
        graph_report.mark_frozen(quantized, value, form, value_of(match.output_node()).dtype)
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(name)
    node.meta["val"] = form.empty(value_of(weight))
    return node, form


@register_freezing_graph_pattern(CallFunction(ops.linear, Arg(), Arg(), Arg(), Arg()), extra_check=_applies)
def _replace_linear(match: Match, x: fx.Node, weight: fx.Node, scale: fx.Node, bias: fx.Node | None) -> None:
    value, form = _made(match, weight, scale)
    call, more = form.linear(value_of(weight).shape[0])
    if bias is None:
        match.replace_by_example(lambda x, weight: call(x, weight, *more, None), [x, value])
    else:
        match.replace_by_example(lambda x, weight, bias: call(x, weight, *more, bias), [x, value, bias])


@register_freezing_graph_pattern(CallFunction(ops.dequant, Arg(), Arg(), Arg()), extra_check=_applies)
def _replace_dequant(match: Match, weight: fx.Node, scale: fx.Node, dtype: torch.dtype) -> None:
    value, _ = _made(match, weight, scale)
    node = match.output_node()
    node.replace_all_uses_with(value)
    match.graph.erase_node(node)
