"""Whole models: ``quantize_`` makes linears MXFP8, ``dequantize_at_load_`` makes them dense, ``pack_`` packs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, settings
from .format import BLOCK_SIZE, COMPUTE_DTYPES, check_compute_dtype, check_rule
from .nn import Mxfp8Linear, PackedMxfp8Linear, frozen_parameter

_CHUNK_ELEMENTS = 1 << 20

# These read the weight of their linears directly (fused attention paths), so a packed one cannot stand in.
_READS_WEIGHTS_OF_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class LayerSummary:
    """What happened to one linear layer.

    Attributes:
        name: dotted path in the model; of a layer used twice, the first.
        shape: of the weight, ``(N, K)``.
        action: "quantized" (by ``quantize_``), "kept" (by ``checkpoint.load_into``), "dequantized" (by that or
            ``dequantize_at_load_``), or "left".
        reason: why it was left, or dequantized by ``load_into``; else "".
        bytes_before: of weight and scale, before.
        bytes_after: of weight and scale, after.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    reason: str
    bytes_before: int
    bytes_after: int


def quantize_(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None, rule: str = "rceil"
) -> list[LayerSummary]:
    """Swaps the ``nn.Linear`` layers of ``model`` for ``Mxfp8Linear``, in place, layer by layer.

    Layers and weights used in several places stay shared. A layer that cannot be packed without changing
    the model is left as it is, with the reason in the summary.

    Args:
        model: any module but a bare ``nn.Linear``, which cannot be swapped in place.
        filter_fn: ``(module, name) -> bool``; None takes every linear.
        rule: see ``mxfp8_ops.quantize``.

    Returns:
        One entry for each distinct ``nn.Linear`` that the filter selected.

    Raises:
        TypeError: model is a bare ``nn.Linear``. ValueError: unknown rule.
    """
    check_rule(rule)
    if isinstance(model, nn.Linear):
        raise TypeError("quantize_ cannot swap the model itself: use Mxfp8Linear.from_linear(model)")
    selected: dict[nn.Linear, str] = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (filter_fn is None or filter_fn(module, name))
    }
    left = linears_to_leave(model, selected)
    once = _OncePerKey((linear.weight,) for linear in selected if linear not in left)
    places = module_places(model)
    summary = []
    while selected:
        linear = next(iter(selected))
        name, (shape, before) = selected.pop(linear), _shape_and_bytes(linear)
        if linear in left:
            summary.append(LayerSummary(name, shape, "left", left[linear], before, before))
            continue
        weight, scale = once.get((linear.weight,), partial(_quantized, linear.weight, rule))
        module = Mxfp8Linear.from_quantized(weight, scale, linear.bias).train(linear.training)
        summary.append(LayerSummary(name, shape, "quantized", "", before, weight.nbytes + scale.nbytes))
        swap_module(places, linear, module)
        del linear  # its weight goes before the next one is quantized
    return summary


def dequantize_at_load_(
    model: nn.Module, dequant_at_load: bool | None = None, dtype: torch.dtype = torch.bfloat16
) -> list[LayerSummary]:
    """Swaps the ``Mxfp8Linear`` layers of ``model`` for ``nn.Linear`` in ``dtype``, in place, when the flag
    (``MXFP8_DEQUANT_AT_LOAD``) is on or unset. One layer at a time, so memory never exceeds the
    dequantized model by more than one layer. Layers that a plain linear cannot replace are left, with the reason in the
    summary: subclasses of ``Mxfp8Linear``, those with hooks, and those that are compiled by themselves.

    Args:
        model: any module but a bare ``Mxfp8Linear``.
        dequant_at_load: beats the environment unless None.
        dtype: of weights and biases after: float32, bfloat16 or float16.

    Returns:
        One entry for each distinct layer; empty when the flag is off.

    Raises:
        TypeError: a bare ``Mxfp8Linear``, or another dtype. ValueError: the flag is neither on nor off.
    """
    check_compute_dtype(dtype, "dtype")
    if isinstance(model, Mxfp8Linear):
        raise TypeError("dequantize_at_load_ cannot swap the model itself: put it into a container")
    if settings.dequant_at_load(dequant_at_load) is False:
        return []
    layers = {module: name for name, module in model.named_modules() if isinstance(module, Mxfp8Linear)}
    compiled = _compiled_alone(model)
    left = {layer: reason for layer in layers if (reason := _why_not_replaced(layer, compiled))}
    once = _OncePerKey(layer._held() for layer in layers if layer not in left)
    biases = _OncePerKey((layer.bias,) for layer in layers if layer not in left and layer.bias is not None)
    places = module_places(model)
    summary = []
    while layers:
        layer = next(iter(layers))
        name, shape = layers.pop(layer), (layer.out_features, layer.in_features)
        before = sum(tensor.nbytes for tensor in layer._held())
        if layer in left:
            summary.append(LayerSummary(name, shape, "left", left[layer], before, before))
            continue
        weight = once.get(layer._held(), partial(_dequantized, layer, dtype))
        bias = None if layer.bias is None else biases.get((layer.bias,), partial(_cast_bias, layer.bias, dtype))
        summary.append(LayerSummary(name, shape, "dequantized", "", before, weight.nbytes))
        swap_module(places, layer, _dense_linear(layer, weight, bias))
        del layer  # its bytes go before the next layer is made
    return summary


def pack_(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Packs every ``Mxfp8Linear`` of ``model`` for GPUs, in place: see ``Mxfp8Linear.pack_``. One weight at a time, so
    memory exceeds that of the packed model by one layer at most.

    Layers that share a weight go on sharing it, if their scales are equal. Layers that are packed already and
    subclasses of ``Mxfp8Linear`` stay as they are.

    Args:
        model: any module, also a bare ``Mxfp8Linear``.
        dtype: see ``Mxfp8Linear.pack_``.

    Returns:
        How many layers were packed by this call.

    Raises:
        TypeError, ValueError: a weight is not MXFP8 any more, wants a gradient or was released. Other layers may be
        packed already.
    """
    sharing: dict[Tensor, list[Mxfp8Linear]] = {}
    for module in model.modules():
        if type(module) is Mxfp8Linear:
            sharing.setdefault(module.weight, []).append(module)
    count = sum(map(len, sharing.values()))
    while sharing:
        _pack_sharing(
            sharing.popitem()[1], dtype
        )  # no name holds the weight: its bytes go before the next one is packed
    return count


def _pack_sharing(layers: list[Mxfp8Linear], dtype: torch.dtype | None) -> None:
    """Packs layers that have one weight: once, unless their scales differ."""
    while layers:
        scale = layers[0].weight_scale  # moving a module makes a scale of its own for each layer
        same = [
            layer
            for layer in layers
            if layer.weight_scale is scale or (not scale.is_meta and torch.equal(layer.weight_scale, scale))
        ]
        for_dtype = layers[0]._packed_for() if dtype is None else dtype
        packed = frozen_parameter(functional.pack(*layers[0].quantized(), for_dtype))
        for layer in same:
            layer._hold_packed(packed)
        layers = [layer for layer in layers if layer not in same]


def dequant_bounded(weight: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``dequant`` in chunks of rows, so that float32 intermediates stay a few megabytes whatever the layer.

    Args:
        weight: ``[..., K]``. scale: ``[..., K/32]`` uint8. dtype: of the result.
        out: ``[..., K]`` in ``dtype``, written in place and returned; allocated when None.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.dim() == 1 or weight.numel() <= _CHUNK_ELEMENTS:
        return out.copy_(functional.dequant(weight, scale, dtype))
    rows = max(1, _CHUNK_ELEMENTS // (weight.numel() // weight.shape[0]))
    for start in range(0, weight.shape[0], rows):
        chunk = slice(start, start + rows)
        if weight.dim() > 2 and rows == 1:
            dequant_bounded(weight[start], scale[start], dtype, out[start])
        else:
            out[chunk] = functional.dequant(weight[chunk], scale[chunk], dtype)
    return out


class _OncePerKey:
    """Makes something of a layer's tensors once, for all layers that share them, and lets go of both after
    the last one.
    """

    def __init__(self, keys: Iterable[tuple[Tensor, ...]]) -> None:
        self.uses = Counter(keys)
        self.made: dict[tuple[Tensor, ...], Any] = {}

    def get(self, key: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        made = self.made[key]
        self.uses[key] -= 1
        if not self.uses[key]:
            del self.uses[key], self.made[key]
        return made


def _quantized(weight: Tensor, rule: str) -> tuple[nn.Parameter, Tensor]:
    elements, scale = functional.quantize(weight.detach(), rule)
    return frozen_parameter(elements), scale


def _dequantized(layer: Mxfp8Linear, dtype: torch.dtype) -> nn.Parameter:
    return frozen_parameter(dequant_bounded(*layer.quantized(), dtype))


def _cast_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    return bias if bias.dtype == dtype else nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)


def _dense_linear(layer: Mxfp8Linear, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear.train(layer.training)


def _shape_and_bytes(linear: nn.Linear) -> tuple[tuple[int, ...], int]:
    if nn.parameter.is_lazy(linear.weight):
        return (linear.out_features, linear.in_features), 0
    return tuple(linear.weight.shape), linear.weight.nbytes


def linears_to_leave(model: nn.Module, selected: dict[nn.Linear, str]) -> dict[nn.Linear, str]:
    """Which of the selected linears must stay, and why."""
    users: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append((module, name))
    readers = {
        child: name
        for name, module in model.named_modules()
        if isinstance(module, _READS_WEIGHTS_OF_CHILDREN)
        for child in module.children()
    }
    left: dict[nn.Linear, str] = {}
    compiled = _compiled_alone(model)
    for linear in selected:
        reason = _why_not_replaced(linear, compiled) or _why_unquantizable(linear)
        if linear in readers:
            reason = f"{readers[linear]} reads its weight directly"
        if reason:
            left[linear] = reason
    changed = True
    while changed:  # a linear that stays keeps every other layer on its weight as well
        changed = False
        for linear in selected:
            for user, name in users.get(linear.weight, ()):  # a parametrized weight is made anew each time
                if linear not in left and (user not in selected or user in left):
                    left[linear] = f"its weight is shared with {name}, which is not quantized"
                    changed = True
    return left


def _why_not_replaced(layer: nn.Module, compiled: set[nn.Module]) -> str:
    """Why another module in the place of this linear would do something else; "" if it would not."""
    if type(layer) not in (nn.Linear, Mxfp8Linear, PackedMxfp8Linear):
        base = "nn.Linear" if isinstance(layer, nn.Linear) else "Mxfp8Linear"
        return f"{type(layer).__name__} is a subclass of {base}"
    if layer in compiled:
        return "it is compiled by itself, and would still compute what it was: do this before torch.compile"
    if any(_hooks(layer)):
        return "it has hooks, which a new module would lose"
    return ""


def _compiled_alone(model: nn.Module) -> set[nn.Module]:
    """Modules given to ``torch.compile`` themselves, which go on being called whatever takes their place."""
    children = (module._modules.get("_orig_mod") for module in model.modules())
    return {child for child in children if child is not None}


def _why_unquantizable(linear: nn.Linear) -> str:
    if linear.in_features == 0 or linear.in_features % BLOCK_SIZE:
        return f"in_features {linear.in_features} is not a multiple of {BLOCK_SIZE}"
    if linear.out_features == 0:
        return "out_features is 0"
    if linear.weight.dtype not in COMPUTE_DTYPES:
        return f"weight dtype {linear.weight.dtype} is not float32, bfloat16 or float16"
    return ""


def _hooks(module: nn.Module) -> Iterator[object]:
    yield from (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    yield "forward" in module.__dict__  # a method patched onto the instance


_Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def module_places(model: nn.Module) -> _Places:
    """Where every module hangs: parents and names, several for a module that is used several times."""
    places: _Places = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places


def swap_module(places: _Places, old: nn.Module, new: nn.Module) -> None:
    for parent, name in places.pop(old):
        setattr(parent, name, new)
