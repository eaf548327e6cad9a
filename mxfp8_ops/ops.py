"""The operators as torch sees them: schemas, fakes, dispatch per device. See ``derivatives`` for autograd and autocast.

``torch.library.Library`` rather than the ``custom_op`` decorator, which costs 10 us more a call. The
reference is the kernel of every device (CompositeExplicitAutograd); a device's own kernels are registered
over it under that device's key.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

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
