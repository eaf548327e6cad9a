"""The operators under autograd, function transforms and autocast: what torch asks before a device computes.

x and bias of a linear are differentiable, weights are frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .gpu import replay
from .ops import dequant, linear, quantize

# --- autograd: linear is differentiable in x and bias, weights are frozen --------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return linear(x, weight, scale, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, scale, _ = inputs
        ctx.save_for_backward(weight, scale)
        ctx.save_for_forward(weight, scale)
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, grad, lambda: ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, *tangents: Tensor | None) -> Tensor:
        weight, scale = ctx.saved_tensors
        bias_tangent = tangents[-1]
        if x_tangent is None:
            assert bias_tangent is not None
            return bias_tangent.expand(ctx.shape).clone()
        return linear(x_tangent, weight, scale, bias_tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Tensor, int]:
        if all(dim is None for dim in in_dims[1:]):  # only x is batched: one more leading dimension
            x, *rest = args
            return linear(x.movedim(in_dims[0], 0), *rest), 0  # type: ignore[union-attr,arg-type]
        samples = (
            [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]  # type: ignore[union-attr]
            for i in range(info.batch_size)
        )
        return torch.stack([linear(*sample) for sample in samples]), 0


def gradients(ctx: Any, grad: Tensor, quantized: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
    """Of a linear's four arguments, of which x is the first and bias the last, from its weight and scale."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequant(*quantized(), grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias


def check_frozen(weight: Tensor) -> None:
    has_tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None
    if has_tangent or (weight.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "an MXFP8 weight is frozen and cannot have a gradient: call weight.requires_grad_(False), "
            "or train the unquantized weight"
        )


def needs_derivative(x: Tensor, bias: Tensor | None) -> bool:
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return needs_grad or forward_ad._current_level >= 0


def _only(*keys: str) -> int:
    """What the keys of a call that has come to Autograd are if it goes on to a device's kernel directly: there are no
    modes, wrappers or lazy tensors, and the second trip through the dispatcher can be spared.
    """
    sets = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in keys]
    return functools.reduce(lambda one, other: one | other, sets).raw_repr()


_AUTOGRAD_AND_CPU = _only("AutogradCPU", "CPU")
_AUTOGRAD_AND_CUDA = _only("AutogradCUDA", "CUDA")


def goes_on_to_cuda(keys: Any) -> bool:
    """Whether a call with these keys goes on to the kernel for CUDA directly."""
    return keys.raw_repr() == _AUTOGRAD_AND_CUDA


def _linear_autograd(keys: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_frozen(weight)
    if needs_derivative(x, bias):
        return _Linear.apply(x, weight, scale, bias)
    if goes_on_to_cuda(keys):
        out = replay.again("linear", (x, weight, scale, bias))
        if out is not None:
            return out
    if keys.raw_repr() == _AUTOGRAD_AND_CPU:
        return ops._linear_cpu(x, weight, scale, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return linear(x, weight, scale, bias)


def _linear_functorch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_frozen(weight)
    return _Linear.apply(x, weight, scale, bias)


def _dequant_autograd(keys: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_frozen(weight)
    if goes_on_to_cuda(keys):
        out = replay.again("dequant", (weight, scale), dtype)
        if out is not None:
            return out
    if keys.raw_repr() == _AUTOGRAD_AND_CPU:
        return ops._dequant_cpu(weight, scale, dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return dequant(weight, scale, dtype)


def _quantize_autograd(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return quantize(x, rule)


ops._library.impl("linear", _linear_autograd, "Autograd", with_keyset=True)
ops._library.impl("dequant", _dequant_autograd, "Autograd", with_keyset=True)
ops._library.impl("quantize", _quantize_autograd, "Autograd")
# Under torch.func transforms an autograd.Function must meet the transform before the dispatcher does: from
# inside the Autograd key the transform's own state is already gone, and apply() has no kernel to find.
ops._library.impl("linear", _linear_functorch, "FuncTorchDynamicLayerFrontMode")


# --- autocast: x and bias are cast as F.linear would, the packed weight never is --------------------------


def under_autocast(
    device: str, key: str, op: Any, x: Tensor, bias: Tensor | None, arguments: Callable[..., tuple[Any, ...]]
) -> Tensor:
    """Calls ``op`` on what ``arguments(x, bias)`` makes of the two in autocast's dtype."""
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device
        return tensor.to(dtype) if eligible else tensor

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
        return op(*arguments(cast(x), None if bias is None else cast(bias)))


def _linear_autocast(device: str, key: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return under_autocast(device, key, linear, x, bias, lambda x, bias: (x, weight, scale, bias))


AUTOCAST_KEYS = (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"), ("xpu", "AutocastXPU"))

for _device, _key in AUTOCAST_KEYS:
    ops._library.impl("linear", functools.partial(_linear_autocast, _device, _key), _key)
