"""Fold under freezing: an Inductor pattern on constants.

before: ``y = mxfp8.linear(x, _frozen_weight, _frozen_scale, bias)``
after:  ``y = aten.addmm(bias, x, permute(_mxfp8_dequantized, [1, 0]))``, a constant of the graph

before: ``w = mxfp8.dequant(_frozen_weight, _frozen_scale, dtype)``
after:  ``_mxfp8_dequantized``

Applied while Inductor freezes a graph, before it packs constants for its own kernels, and only in compiles
that carry our passes, with the flag on. (Inductor's constant folder never touches ``mxfp8::dequant``: see
``mxfp8_ops.ops``.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.fx_passes.freezing_patterns import register_freezing_graph_pattern
from torch._inductor.pattern_matcher import Arg, CallFunction, Match

from mxfp8_ops import ops
from mxfp8_ops.convert import dequant_bounded

from . import passes
from .graph import returned_storages, storages, value_of
from .text import dtype_name


def _constant(node: fx.Node) -> Tensor | None:
    value = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return value if isinstance(value, Tensor) else None


def _may_fold(match: Match) -> bool:
    ours = passes.active()
    if ours is None or not ours.fold:
        return False
    node = match.output_node()
    weight, scale = match.args[1:3] if node.target is ops.linear else match.args[:2]
    if _constant(weight) is None or _constant(scale) is None:
        return False
    # A constant handed out by the graph could be written to by whoever receives it.
    return node.target is ops.linear or not storages(node) & returned_storages(match.graph)


def _dequantized(graph: fx.Graph, weight: fx.Node, scale: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The constant node that holds the dequantized weight. One node serves every use of a weight: Inductor
    deletes an attribute together with any of its nodes.
    """
    gm = graph.owning_module
    name = f"_mxfp8_dequantized_{weight.target}_{scale.target}_{dtype_name(dtype)}"
    for node in graph.find_nodes(op="get_attr"):
        if node.target == name:
            return node
    packed, scales = _constant(weight), _constant(scale)
    assert gm is not None
    assert packed is not None
    assert scales is not None
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad(), torch.inference_mode(False):
        value = dequant_bounded(packed.detach(), scales.detach(), dtype)
    gm.register_buffer(name, value)
    graph_report = passes.current_report()
    if graph_report is not None:
        graph_report.mark_frozen(packed, value)
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(name)
    example = value_of(weight)
    node.meta["val"] = example.new_empty(example.shape, dtype=dtype)
    return node


@register_freezing_graph_pattern(CallFunction(ops.linear, Arg(), Arg(), Arg(), Arg()), extra_check=_may_fold)
def _fold_linear(match: Match, x: fx.Node, weight: fx.Node, scale: fx.Node, bias: fx.Node | None) -> None:
    dense = _dequantized(match.graph, weight, scale, value_of(match.output_node()).dtype)
    if bias is None:
        match.replace_by_example(lambda x, weight: F.linear(x, weight), [x, dense])
    else:
        match.replace_by_example(lambda x, weight, bias: F.linear(x, weight, bias), [x, dense, bias])


@register_freezing_graph_pattern(CallFunction(ops.dequant, Arg(), Arg(), Arg()), extra_check=_may_fold)
def _fold_dequant(match: Match, weight: fx.Node, scale: fx.Node, dtype: torch.dtype) -> None:
    node = match.output_node()
    node.replace_all_uses_with(_dequantized(match.graph, weight, scale, dtype))
    match.graph.erase_node(node)
