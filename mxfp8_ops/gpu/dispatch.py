"""Which kernel computes an operator on a CUDA device. Arguments are checked already."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.errors import TritonError

from . import elementwise, gemv, plans_vectors, replay


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``mxfp8_ops.reference.dequant``."""
    with _on(weight.device):
        return elementwise.dequant(weight, scale, dtype, converts_e4m3(weight.device))


def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """See ``mxfp8_ops.reference.quantize``."""
    with _on(x.device):
        return elementwise.quantize(x, rule, converts_e4m3(x.device))


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See ``mxfp8_ops.reference.linear``. Where there are no kernels for as many rows, the weight is dequantized as a
    whole first.
    """
    rows = x.numel() // weight.shape[1]
    out = None
    if rows > 0:
        with _on(x.device):
            out = _one_byte_weight(x.reshape(rows, -1), weight, scale, bias)
    if out is None:
        return F.linear(x, dequant(weight, scale, x.dtype), bias).contiguous()
    return out.view(*x.shape[:-1], -1)


_HOPPER_ROWS = 9  # from here on, Hopper has other kernels to choose from
_MMA_ROWS = 64
_MOST_ROWS = 6144  # beyond, it hardly matters how long it takes to dequantize a canonical weight once


def _one_byte_weight(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """``linear`` for ``x [M, K]``, M > 0; None where M is too much for the kernels that there are."""
    rows = len(x)
    native = converts_e4m3(x.device)
    if rows <= _MOST_ROWS and native and x.dtype != torch.float32 and weight.numel() < 2**31:
        function, plan = _in_gluon(rows, weight.shape, x.device)
        if function is not None:
            offset = None if bias is None else bias.contiguous()
            out = _or_none(function, _aligned(x), _aligned(weight), _aligned(scale), offset, *plan)
            if out is not None:
                return out
    return gemv.linear(x.contiguous(), weight, scale, bias, native) if rows <= gemv.MAX_ROWS else None


def _in_gluon(
    rows: int, shape: torch.Size, device: torch.device
) -> tuple[Callable[..., Tensor] | None, tuple[Any, ...]]:
    """The ``linear`` of the kernels for as many rows, and what else it takes; None where there are none."""
    n, k = shape
    hopper = _hopper_kernels(device) if rows >= _HOPPER_ROWS and k % 128 == 0 else None
    if hopper is not None:
        return hopper.linear, ()
    processors = _processors(device)
    if rows <= plans_vectors.MAX_ROWS:
        kernels = _gluon_kernels("vector" if rows == 1 else "vectors")
        further = (processors,) if rows == 1 else (processors, _capability(device) < (9, 0))
        return (None, ()) if kernels is None else (kernels.linear, further)
    kernels = _gluon_kernels("mma") if rows <= _MMA_ROWS else None
    return (None, ()) if kernels is None else (kernels.linear, (kernels.plan(rows, n, k, processors),))


def linear_packed(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    """``linear`` on a packed weight. Where there are no kernels for it, the weight is dequantized as a whole first: for
    float32, and on chips that are not Hopper's.
    """
    k = x.shape[-1]
    rows = x.numel() // k
    if rows == 0:
        return x.new_empty((*x.shape[:-1], n))
    packed = _aligned(packed)
    bias = None if bias is None else bias.contiguous()
    with _on(x.device):
        kernels = _hopper_kernels(x.device) if x.dtype != torch.float32 and packed.numel() < 2**31 else None
        if kernels is not None:
            out = _or_none(kernels.linear_packed, _aligned(x.reshape(rows, k)), packed, n, bias)
            if out is not None:
                return out.view(*x.shape[:-1], n)
        return F.linear(x, elementwise.dequant_packed(packed, n, k, x.dtype), bias).contiguous()


def reads_packed(device: torch.device) -> bool:
    """Whether there are kernels for packed weights on a device: elsewhere they are dequantized in every call."""
    return _hopper_kernels(device) is not None


_gluon = True


def _hopper_kernels(device: torch.device) -> ModuleType | None:
    if torch.version.hip is not None or _capability(device) != (9, 0):
        return None
    return _gluon_kernels("hopper")


def _gluon_kernels(name: str) -> ModuleType | None:
    """A module with kernels in Gluon; None where this version of Triton cannot import it."""
    if not _gluon:
        return None
    try:
        return importlib.import_module(f".{name}", __package__)
    except (ImportError, AttributeError, TypeError) as error:
        _do_without_gluon(error)
        return None


def _or_none(function: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """What a function of such a module gives; None where its kernels do not compile."""
    try:
        return function(*args)
    except (TritonError, RuntimeError) as error:
        if not _is_of_compiler(error):
            raise
        _do_without_gluon(error)
        return None


def _do_without_gluon(error: Exception) -> None:
    """Gluon is experimental: another version of Triton may not know what the kernels use."""
    global _gluon
    _gluon = False
    replay.forget()
    message = str(error).splitlines()[-1] if str(error) else repr(error)
    warnings.warn(
        f"MXFP8 weights are dequantized in every call, but for a few rows: kernels in Gluon fail ({message})",
        stacklevel=2,
    )


def _is_of_compiler(error: Exception) -> bool:
    return isinstance(error, TritonError) or "PassManager" in str(error)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at an address that is a multiple of 16."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def converts_e4m3(device: torch.device) -> bool:
    """Whether the hardware, and so Triton, knows the type: NVIDIA from sm_89 on."""
    return torch.version.hip is None and _capability(device) >= (8, 9)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device. Making another one current costs microseconds, so only if needed."""
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
