"""Calling the C functions of one level directly, on tensors that may begin at any byte."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp8_ops.cpu import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
LEVELS = library.supported()


@dataclass
class Calls:
    """The functions of a level on contiguous tensors; x of a linear may have a row stride."""

    library: ctypes.CDLL
    threads: int = 2

    def dequant(self, weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        pointers = (each.data_ptr() for each in (weight, scale, out))
        self.library.mxfp8_dequant(*pointers, scale.numel(), CODES[out.dtype], self.threads)
        return out

    def quantize(self, x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
        weight = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
        scale = torch.empty(*x.shape[:-1], x.shape[-1] // 32, dtype=torch.uint8)
        return self.quantize_into(x, rule, weight, scale)

    def quantize_into(self, x: Tensor, rule: str, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        pointers = (each.data_ptr() for each in (x, weight, scale))
        rule_code = ("floor", "rceil").index(rule)
        self.library.mxfp8_quantize(*pointers, scale.numel(), CODES[x.dtype], rule_code, self.threads)
        return weight, scale

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        (m, k), n = x.shape, len(weight)
        out = torch.empty(m, n, dtype=x.dtype) if out is None else out
        offset = None if bias is None else bias.data_ptr()
        pointers = weight.data_ptr(), scale.data_ptr(), offset, out.data_ptr()
        code = CODES[x.dtype]
        assert self.library.mxfp8_linear(x.data_ptr(), x.stride(0), *pointers, m, n, k, code, self.threads) == 0
        return out


def calls(level: str, threads: int = 2) -> Calls:
    return Calls(library.load(level), threads)
