"""The program that a package of AOTInductor is compiled from, in which nothing is left that would have to be found when
the package runs.

before: ``y = mxfp8.linear(x, weight, scale, bias)``
after:  ``w = mxfp8.dequant_loop(weight, scale, bfloat16); y = aten.linear(x, w, bias)``
fused:  ``y = mxfp8.linear_portable(x, weight, scale, bias, native)``

Inductor generates code for the loop, and compiles the Triton kernel of the other along with its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from mxfp8_ops import gpu, ops, packed, settings
from mxfp8_ops.nn import Mxfp8Linear, PackedMxfp8Linear

from . import compat, kernels, released
from .graph import is_dequant, is_linear, value_of
from .recognising import recognise_all
from .writes import storages, written_storages


def program(
    model: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    dequant_at_load: bool | None = None,
    fused: bool = False,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """What ``aoti_package`` compiles, see there: ATen, ``mxfp8.dequant_loop`` and ``mxfp8.linear_portable``."""
    _check_call(model, inputs)
    fold = folds(dequant_at_load, fused)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), None)
    exported = torch.export.export(_canonical(model), args, kwargs, dynamic_shapes=dynamic_shapes)
    graphs = [module for module in exported.graph_module.modules() if isinstance(module, fx.GraphModule)]
    if fused:
        recognise_all(exported.graph_module)
        if sum(_fuse(gm.graph) for gm in graphs) == 0:
            raise ValueError("fused=True, but the model calls no MXFP8 linear")
    for gm in graphs:
        _lower(gm.graph, share=fold)
        _refuse_others(gm.graph)
        gm.recompile()
    return exported


def folds(dequant_at_load: bool | None, fused: bool) -> bool:
    """Whether weights are dequantized once, when a package is loaded: the flag, which contradicts ``fused``."""
    fold = settings.dequant_at_load(dequant_at_load) is True
    if fold and fused:
        raise ValueError(
            "fused=True reads the weight's bytes in every call, so there is nothing to dequantize at load: "
            "pass dequant_at_load=False, or leave out fused"
        )
    return fold


def _check_call(model: object, inputs: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"only a torch.nn.Module can be packaged, got {type(model).__name__}")
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise TypeError(
            f"inputs must be a tuple, or a dict by name, of the model's arguments, got {type(inputs).__name__}"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        released.refuse(tensor, name, "a package holds the weights")


# --- packed layers ----------------------------------------------------------------------------------------


def _canonical(model: nn.Module) -> nn.Module:
    """``model``, or where layers are packed a copy in which they are not; all other tensors are shared."""
    model = compat.uncompiled(model)  # type: ignore[assignment]
    memo: dict[int, Any] = {}
    first: dict[int, Mxfp8Linear] = {}
    for layer in model.modules():
        if isinstance(layer, PackedMxfp8Linear):
            memo[id(layer)] = twin = _unpacked(layer)
            same = first.setdefault(id(layer.weight_packed), twin)  # layers that share a weight go on sharing it
            twin.weight, twin.weight_scale = same.weight, same.weight_scale
    if not memo:
        return model
    memo |= {id(layer): layer for layer in model.modules() if type(layer) is Mxfp8Linear}
    memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model has packed layers and cannot be copied ({error}): call unpack_() on them"
        ) from error


def _unpacked(layer: PackedMxfp8Linear) -> Mxfp8Linear:
    twin = Mxfp8Linear.__new__(PackedMxfp8Linear)
    twin.__dict__.update(layer.__dict__)  # unpack_ gives it dicts of its own
    return twin.unpack_()


# --- graphs -----------------------------------------------------------------------------------------------


def _lower(graph: fx.Graph, share: bool) -> None:
    """Linears and dequants become loops and plain linears.

    Args:
        share: one loop for every use of a weight, which is right if it runs once; else the first use would keep the
            dequantized weight in memory until the last. What the graph writes to has a loop for each use.
    """
    loops: dict[tuple[Any, ...], fx.Node] = {}
    written = written_storages(graph)
    for node in list(graph.nodes):
        if not is_linear(node) and not is_dequant(node):
            continue
        x, weight, scale, bias = node.args if is_linear(node) else (None, *node.args[:2], None)
        key = weight, scale, value_of(node).dtype
        shared = share and not storages((node, weight, scale)) & written
        loop = loops.get(key) if shared else None
        if loop is None:
            _check_device(value_of(weight).device)
            loop = _call_before(node, kernels.dequant_loop, *key)
            if shared:
                loops[key] = loop
        new = _call_before(node, torch.ops.aten.linear.default, x, loop, bias) if is_linear(node) else loop
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _fuse(graph: fx.Graph) -> int:
    """Linears become calls of the Triton kernel, but for those of no rows; returns how many linears there were."""
    nodes = [node for node in graph.nodes if is_linear(node)]
    for node in nodes:
        device, size = value_of(node).device, value_of(node).numel()
        if isinstance(size, int) and size == 0:
            continue
        portable = _portable(device)
        node.replace_all_uses_with(_call_before(node, portable.linear, *node.args, kernels.converts_e4m3(device)))
        graph.erase_node(node)
    return len(nodes)


def _portable(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        raise ValueError(f"fused=True needs a model on a CUDA device, this one is on {device}")
    if gpu.kernels() is None:
        raise ValueError("fused=True needs Triton, which cannot be imported")
    from mxfp8_ops.gpu import portable

    return portable


def dequant_loops(graph: fx.Graph) -> list[fx.Node]:
    """The calls of ``mxfp8::dequant_loop`` in a graph, but not in its sub-graphs."""
    return list(graph.find_nodes(op="call_function", target=kernels.dequant_loop))


def _call_before(node: fx.Node, function: Any, *args: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args)
    new.meta = dict(node.meta)
    new.meta["val"] = function(*fx.map_arg(args, value_of))
    return new


def _check_device(device: torch.device) -> None:
    if device.type == "cpu" and not compat.packages_e4m3_on_cpu():
        raise ValueError(
            f"AOTInductor of torch {torch.__version__} cannot compile float8 for the CPU, that of 2.13 can"
        )
    if not kernels.converts_e4m3(device):
        raise ValueError(
            f"code for {device} cannot read float8_e4m3fn: package with fused=True, which decodes it (linear only)"
        )


def _refuse_others(graph: fx.Graph) -> None:
    """Whatever else of this package a graph calls would need it at run time."""
    for node in graph.nodes:
        if node.target is packed.linear_packed:
            raise ValueError(f"{node} calls mxfp8::linear_packed on a packed tensor of its own: call linear instead")
        if node.target in (ops.quantize, packed.pack, packed.unpack):
            raise ValueError(f"{node} calls {node.target}, which would need mxfp8_ops where the package runs")
