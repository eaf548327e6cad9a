"""A stand-in: which kernel computes an operator on the CPU. Arguments are checked already."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import library


def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """See ``mxfp8_ops.reference.quantize``."""
    return reference.quantize(x, rule)


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``mxfp8_ops.reference.dequant``."""
    kernels = library.current()
    assert kernels is not None
    weight, scale = weight.contiguous(), scale.contiguous()
    out = torch.empty(weight.shape)
    pointers = (each.data_ptr() for each in (weight, scale, out))
    kernels.mxfp8_dequant(*pointers, scale.numel(), 0, torch.get_num_threads())
    return out.to(dtype)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See ``mxfp8_ops.reference.linear``."""
    return F.linear(x, dequant(weight, scale, x.dtype), bias)
