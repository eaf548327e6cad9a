"""Which kernel computes an operator on the CPU. Arguments are checked already."""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE
from ..memory import in_large_pages
from . import library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels call a dtype."""
_VALUES_IN_FLOAT32 = {torch.float32: 0, torch.bfloat16: 3, torch.float16: 4}
"""For dequant: values rounded to a dtype, written as float32."""
RULE_CODES = {"floor": 0, "rceil": 1}

_TILES = "amx_bf16"
"""The level in which bfloat16 is multiplied by matrix tiles."""

_LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def _kernels() -> Any:
    kernels = library.current()
    assert kernels is not None  # or nobody calls this module
    return kernels


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``mxfp8_ops.reference.dequant``."""
    weight, scale = weight.contiguous(), scale.contiguous()
    out = in_large_pages(weight.new_empty(weight.shape, dtype=dtype))
    _kernels().mxfp8_dequant(
        weight.data_ptr(), scale.data_ptr(), out.data_ptr(), scale.numel(), DTYPE_CODES[dtype], torch.get_num_threads()
    )
    return out


def quantize(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """See ``mxfp8_ops.reference.quantize``."""
    x = x.contiguous()
    weight = in_large_pages(torch.empty(x.shape, dtype=ELEMENT_DTYPE))
    scale = torch.empty((*x.shape[:-1], x.shape[-1] // BLOCK_SIZE), dtype=SCALE_DTYPE)
    pointers = x.data_ptr(), weight.data_ptr(), scale.data_ptr()
    _kernels().mxfp8_quantize(*pointers, scale.numel(), DTYPE_CODES[x.dtype], RULE_CODES[rule], torch.get_num_threads())
    return weight, scale


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See ``mxfp8_ops.reference.linear``. A few rows of x are multiplied in one pass over the weight; for more, parts
    of the weight are dequantized into the caches, and torch multiplies them there.
    """
    out = x.new_empty(*x.shape[:-1], weight.shape[0])  # in few steps: what Python does takes as long as some rows
    linear_into(x, weight, scale, bias, out)
    return out


def linear_into(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same in ``out``, which is contiguous."""
    n, k = weight.shape
    rows = x.numel() // k
    if rows == 0:
        return
    stride = k
    if not x.is_contiguous():
        x = x.reshape(rows, k)
        x = x if x.stride(1) == 1 else x.contiguous()
        stride = x.stride(0)
    if not (weight.is_contiguous() and scale.is_contiguous()):
        weight, scale = weight.contiguous(), scale.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    in_large_pages(out)
    if rows > _most_rows(x.dtype):
        _by_panels(x.view(rows, k), weight, scale, bias, out.view(rows, n))
        return
    _kernels().mxfp8_linear(
        x.data_ptr(),
        stride,
        weight.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        n,
        k,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )


_MOST_ROWS = 32


def _most_rows(dtype: torch.dtype) -> int:
    """Rows of x up to which one pass over the weight is the fastest."""
    return sys.maxsize if dtype == torch.bfloat16 and library.level() == _TILES else _MOST_ROWS


# --- many rows: panels ---------------------------------------------------------------------------------------


def _by_panels(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes the linear of ``x [M, K]`` into ``out [M, N]``; the panels are ``[some of N, K]``."""
    n, k = weight.shape
    code, threads = DTYPE_CODES[x.dtype], torch.get_num_threads()
    a, b = x, bias
    if not _multiplies(x.dtype):
        a, b, code = x.float(), None if bias is None else bias.float(), _VALUES_IN_FLOAT32[x.dtype]
    panel = _buffer(a.dtype, _panel_rows(a.dtype, k), k)
    dequantize = _kernels().mxfp8_dequant
    codes, scales, blocks = weight.data_ptr(), scale.data_ptr(), k // BLOCK_SIZE
    for first in range(0, n, len(panel)):
        some = panel[: n - first]
        last = first + len(some)
        count = len(some) * blocks
        dequantize(codes + first * k, scales + first * blocks, some.data_ptr(), count, code, threads)
        result = torch.mm(a, some.t()) if b is None else torch.addmm(b[first:last], a, some.t())
        out[:, first:last] = result


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a dtype faster than in float32 on this machine."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


_local = threading.local()


def _panel_rows(dtype: torch.dtype, k: int) -> int:
    return max(32, _panel_bytes() // (k * dtype.itemsize))


@functools.cache
def _panel_bytes() -> int:
    """Of a weight that is dequantized in parts, at a time: large, because products with a few columns are slow, and
    small, because it should stay in the last cache: a quarter of that, from 2 to 8 MiB.
    """
    try:
        kibibytes = int(_LAST_CACHE.read_text().strip().removesuffix("K"))
    except (OSError, ValueError):  # not Linux, or its virtual machine does not tell
        kibibytes = 0
    return min(max(kibibytes * 1024 // 4, 2 << 20), 8 << 20)


def _buffer(dtype: torch.dtype, rows: int, k: int) -> Tensor:
    """``[rows, k]``, which this thread uses again and again."""
    buffers: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("panels", {})
    if dtype not in buffers or buffers[dtype].numel() < rows * k:
        buffers[dtype] = torch.empty(rows * k, dtype=dtype)
    return buffers[dtype][: rows * k].view(rows, k)
