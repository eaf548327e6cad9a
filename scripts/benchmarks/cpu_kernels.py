"""The CPU's elementwise kernels without their operators: on memory that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mxfp8_ops.cpu import library
from mxfp8_ops.cpu.dispatch import DTYPE_CODES, RULE_CODES

from .timing import Calls


def columns(weights: Sequence[tuple[Tensor, Tensor]], dense: Sequence[Tensor]) -> dict[str, Calls]:
    """Named "dequant alone" and "quantize alone", in bfloat16; none where the reference computes."""
    kernels = library.current()
    if kernels is None:
        return {}
    threads, code = torch.get_num_threads(), DTYPE_CODES[torch.bfloat16]
    outs = [torch.zeros_like(each) for each in dense]
    quantized = [(torch.zeros_like(w.view(torch.uint8)), torch.zeros_like(s)) for w, s in weights]

    def dequant(weight: Tensor, scale: Tensor, out: Tensor) -> None:
        pointers = weight.data_ptr(), scale.data_ptr(), out.data_ptr()
        kernels.mxfp8_dequant(*pointers, scale.numel(), code, threads)

    def quantize(x: Tensor, weight: Tensor, scale: Tensor) -> None:
        pointers = x.data_ptr(), weight.data_ptr(), scale.data_ptr()
        kernels.mxfp8_quantize(*pointers, scale.numel(), code, RULE_CODES["rceil"], threads)

    return {
        "dequant alone": [partial(dequant, *w, out) for w, out in zip(weights, outs, strict=True)],
        "quantize alone": [partial(quantize, x, *out) for x, out in zip(dense, quantized, strict=True)],
    }
