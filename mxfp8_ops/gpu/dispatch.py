"""Which kernel computes an operator on a CUDA device. Arguments are checked already."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """See ``mxfp8_ops.reference.linear``. A few rows are computed from the packed weight; for more, the weight is
    dequantized as a whole first.
    """
    n, k = weight.shape
    rows = x.numel() // k
    if not 1 <= rows <= gemv.MAX_ROWS:
        return F.linear(x, dequant(weight, scale, x.dtype), bias).contiguous()
    with _on(x.device):
        out = gemv.linear(x.reshape(rows, k).contiguous(), weight, scale, bias, _converts_e4m3(x.device))
    return out.view(*x.shape[:-1], n)


def _converts_e4m3(device: torch.device) -> bool:
    """Whether the hardware, and so Triton, knows the type: NVIDIA from sm_89 on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device. Making another one current costs microseconds, so only if needed."""
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
