"""The operators as torch sees them: schemas, fakes, autograd, autocast, vmap, dispatch per device.

``torch.library.Library`` rather than the ``custom_op`` decorator, which costs 10 us more a call. The
reference is the kernel of every device (CompositeExplicitAutograd); a device's own kernels are registered
over it under that device's key.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, gpu, reference, settings
from .format import (
    BLOCK_SIZE,
    ELEMENT_DTYPE,
    SCALE_DTYPE,
    check_compute_dtype,
    check_linear,
    check_pair,
    check_quantize,
)
from .gpu import replay

_library = torch.library.Library("mxfp8", "DEF")
# flexible_layout: the kernels take any strides, so a compiler need not copy an argument to please them.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_library.define("quantize(Tensor x, str rule) -> (Tensor, Tensor)", tags=_TAGS)
_library.define("dequant(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor", tags=_TAGS)
_library.define("linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", tags=_TAGS)

quantize = torch.ops.mxfp8.quantize.default
dequant = torch.ops.mxfp8.dequant.default
linear = torch.ops.mxfp8.linear.default


# --- kernels: the reference, on every device -----------------------------------------------------------


def _quantize_kernel(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    check_quantize(x, rule)
    return reference.quantize(x, rule)


def _dequant_kernel(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_pair(weight, scale)
    check_compute_dtype(dtype, "dtype")
    return reference.dequant(weight, scale, dtype)


def _linear_kernel(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(x, weight, scale, bias)
    return reference.linear(x, weight, scale, bias)


for _name, _kernel in (("quantize", _quantize_kernel), ("dequant", _dequant_kernel), ("linear", _linear_kernel)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


# --- kernels: CPUs ----------------------------------------------------------------------------------------


def _cpu() -> Any:
    """The kernels of CPUs; None where the reference is to compute."""
    return cpu.kernels() if settings.kernels() else None


def _quantize_cpu(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    check_quantize(x, rule)
    return (_cpu() or reference).quantize(x, rule)


def _dequant_cpu(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_pair(weight, scale)
    check_compute_dtype(dtype, "dtype")
    return (_cpu() or reference).dequant(weight, scale, dtype)


def _linear_cpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(x, weight, scale, bias)
    return (_cpu() or reference).linear(x, weight, scale, bias)


for _name, _kernel in (("quantize", _quantize_cpu), ("dequant", _dequant_cpu), ("linear", _linear_cpu)):
    _library.impl(_name, _kernel, "CPU")


# --- kernels: CUDA devices ------------------------------------------------------------------------------


def _gpu() -> Any:
    """The kernels of CUDA devices; None where the reference is to compute."""
    return gpu.kernels() if settings.kernels() else None


def _quantize_cuda(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    check_quantize(x, rule)
    return (_gpu() or reference).quantize(x, rule)


def _dequant_cuda(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = replay.again("dequant", (weight, scale), dtype)
    if out is not None:
        return out
    check_pair(weight, scale)
    check_compute_dtype(dtype, "dtype")
    kernels = _gpu()
    if kernels is None:
        return reference.dequant(weight, scale, dtype)
    return replay.learn("dequant", (weight, scale), dtype, lambda: kernels.dequant(weight, scale, dtype))


def _linear_cuda(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    tensors = x, weight, scale, bias
    out = replay.again("linear", tensors)
    if out is not None:
        return out
    check_linear(x, weight, scale, bias)
    kernels = _gpu()
    if kernels is None:
        return reference.linear(x, weight, scale, bias)
    return replay.learn("linear", tensors, None, lambda: kernels.linear(x, weight, scale, bias))


for _name, _kernel in (("quantize", _quantize_cuda), ("dequant", _dequant_cuda), ("linear", _linear_cuda)):
    _library.impl(_name, _kernel, "CUDA")


def reads_packed(device: torch.device) -> bool:
    """Whether ``mxfp8::linear_packed`` computes from the packed weight on a device, which makes it worth packing."""
    kernels = _gpu() if device.type == "cuda" else None
    return kernels is not None and kernels.reads_packed(device)


DEQUANTIZED = "dequantized in every call"


def kernel_name(name: str, device: torch.device) -> str:
    """Which kernel computes the operator ``mxfp8::<name>`` on a device: "reference", or the device's own, of which it
    says if all it does with a packed weight is to dequantize it.
    """
    key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}.get(device.type, "PrivateUse1")
    own = torch._C._dispatch_has_kernel_for_dispatch_key(f"mxfp8::{name}", key)
    if not own or not settings.kernels():
        return "reference"
    if device.type == "cpu":
        host = cpu.kernels()
        return "reference" if host is None else f"cpu, {host.library.level()}"
    if device.type != "cuda":
        return device.type
    kernels = gpu.kernels()
    if kernels is None:
        return "reference"
    return f"cuda, {DEQUANTIZED}" if name == "linear_packed" and not kernels.reads_packed(device) else "cuda"


# --- fakes: the same checks, shapes, dtypes and strides, no data ---------------------------------------


@torch.library.register_fake("mxfp8::quantize", lib=_library)
def _quantize_fake(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    check_quantize(x, rule)
    scale_shape = (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)
    return x.new_empty(x.shape, dtype=ELEMENT_DTYPE), x.new_empty(scale_shape, dtype=SCALE_DTYPE)


@torch.library.register_fake("mxfp8::dequant", lib=_library)
def _dequant_fake(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_pair(weight, scale)
    check_compute_dtype(dtype, "dtype")
    _keep_out_of_constant_folding()
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.register_fake("mxfp8::linear", lib=_library)
def _linear_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(x, weight, scale, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep_out_of_constant_folding() -> None:
    """Tells Inductor's freezing, where it is loaded, that this dequant is not its to fold: doubling the
    memory of a weight is the user's decision (the flag), and lowering/fold.py carries it out.

    Told at every trace, because Inductor's list can be cleared by others.
    """
    folding = sys.modules.get("torch._inductor.constant_folding")
    if folding is not None and hasattr(folding, "add_dont_constant_fold"):
        folding.add_dont_constant_fold(dequant)


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
        return _gradients(ctx, grad, lambda: ctx.saved_tensors)

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


def _gradients(ctx: Any, grad: Tensor, quantized: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
    """Of a linear's four arguments, of which x is the first and bias the last, from its weight and scale."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequant(*quantized(), grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias


def _check_frozen(weight: Tensor) -> None:
    has_tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None
    if has_tangent or (weight.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "an MXFP8 weight is frozen and cannot have a gradient: call weight.requires_grad_(False), "
            "or train the unquantized weight"
        )


def _needs_derivative(x: Tensor, bias: Tensor | None) -> bool:
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


def _nothing_between(keys: Any) -> bool:
    """Whether a call with these keys goes on to the kernel for CUDA directly."""
    return keys.raw_repr() == _AUTOGRAD_AND_CUDA


def _linear_autograd(keys: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_frozen(weight)
    if _needs_derivative(x, bias):
        return _Linear.apply(x, weight, scale, bias)
    if _nothing_between(keys):
        out = replay.again("linear", (x, weight, scale, bias))
        if out is not None:
            return out
    if keys.raw_repr() == _AUTOGRAD_AND_CPU:
        return _linear_cpu(x, weight, scale, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return linear(x, weight, scale, bias)


def _linear_functorch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_frozen(weight)
    return _Linear.apply(x, weight, scale, bias)


def _dequant_autograd(keys: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_frozen(weight)
    if _nothing_between(keys):
        out = replay.again("dequant", (weight, scale), dtype)
        if out is not None:
            return out
    if keys.raw_repr() == _AUTOGRAD_AND_CPU:
        return _dequant_cpu(weight, scale, dtype)
    with torch._C._AutoDispatchBelowAutograd():
        return dequant(weight, scale, dtype)


def _quantize_autograd(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return quantize(x, rule)


_library.impl("linear", _linear_autograd, "Autograd", with_keyset=True)
_library.impl("dequant", _dequant_autograd, "Autograd", with_keyset=True)
_library.impl("quantize", _quantize_autograd, "Autograd")
# Under torch.func transforms an autograd.Function must meet the transform before the dispatcher does: from
# inside the Autograd key the transform's own state is already gone, and apply() has no kernel to find.
_library.impl("linear", _linear_functorch, "FuncTorchDynamicLayerFrontMode")


# --- autocast: x and bias are cast as F.linear would, the packed weight never is --------------------------


def _under_autocast(
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
    return _under_autocast(device, key, linear, x, bias, lambda x, bias: (x, weight, scale, bias))


AUTOCAST_KEYS = (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"), ("xpu", "AutocastXPU"))

for _device, _key in AUTOCAST_KEYS:
    _library.impl("linear", functools.partial(_linear_autocast, _device, _key), _key)
