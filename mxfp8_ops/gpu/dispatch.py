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

from . import elementwise, gemv


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``mxfp8_ops.reference.dequant``."""
    with _on(weight.device):
        return elementwise.dequant(weight, scale, dtype)


def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """See ``mxfp8_ops.reference.quantize``."""
    with _on(x.device):
        return elementwise.quantize(x, rule)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See ``mxfp8_ops.reference.linear``. Some rows are computed from the one-byte weight; for more, the weight is
    dequantized as a whole first.
    """
    rows = x.numel() // weight.shape[1]
    out = None
    if 1 <= rows <= _MMA_ROWS:
        with _on(x.device):
            out = _few_rows(x.reshape(rows, -1), weight, scale, bias)
    if out is None:
        return F.linear(x, dequant(weight, scale, x.dtype), bias).contiguous()
    return out.view(*x.shape[:-1], -1)


def _few_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """``linear`` for ``x [M, K]``, on tensor cores where there are kernels for that; None where M is too much for the
    others.
    """
    rows, (n, k) = len(x), weight.shape
    native = _converts_e4m3(x.device)
    if rows > _GEMV_ROWS and native and x.dtype != torch.float32 and weight.numel() < 2**31:
        kernels = _gluon_kernels("mma")
        if kernels is not None:
            plan = kernels.plan(rows, n, k, _processors(x.device))
            offset = None if bias is None else bias.contiguous()
            out = _or_none(kernels.linear, _aligned(x), _aligned(weight), scale.contiguous(), offset, plan)
            if out is not None:
                return out
    if rows > gemv.MAX_ROWS:
        return None
    return gemv.linear(x.contiguous(), weight, scale, bias, native)


_GEMV_ROWS = 2  # beyond, tensor cores are faster
_MMA_ROWS = 64


def linear_packed(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    """``linear`` on a packed weight. Where there are no kernels for it, the weight is dequantized as a whole first:
    for float32, and on chips that are not Hopper's.
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
            out = _or_none(kernels.linear, _aligned(x.reshape(rows, k)), packed, n, bias)
            if out is not None:
                return out.view(*x.shape[:-1], n)
        return F.linear(x, elementwise.dequant_packed(packed, n, k, x.dtype), bias).contiguous()


_gluon = True


def _hopper_kernels(device: torch.device) -> ModuleType | None:
    if torch.version.hip is not None or _capability(device) != (9, 0):
        return None
    return _gluon_kernels("packed")


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


def _converts_e4m3(device: torch.device) -> bool:
    """Whether the hardware, and so Triton, knows the type: NVIDIA from sm_89 on."""
    return torch.version.hip is None and _capability(device) >= (8, 9)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device. Making another one current costs microseconds, so only if needed."""
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
