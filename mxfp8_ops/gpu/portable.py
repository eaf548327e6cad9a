"""Linear for packages of AOTInductor: kernels in plain Triton, which a compiler can take into a graph.

``mxfp8::linear_portable`` is a ``triton_op``: tracing looks into it and finds the launch of one kernel, which Inductor
compiles along with its own. (The kernels in Gluon cannot be had this way, and an opaque operator would have to be
registered where the package runs.) One graph holds one configuration for each linear, chosen when it is traced.

Elements are decoded through float32, in which every code times every scale is exact, and rounded once, to the dtype of
x: no code is special here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import gemv
from .codes import element_to_float32, scale_to_float32

_ANY_ROWS = 64  # for as many a kernel is made where their number is not known


def configuration(rows: int | torch.SymInt) -> dict[str, int]:
    """Constants of the kernel and its warps, for as many rows of x; those for 64 where the number is dynamic.

    For few rows smaller tiles, so that there are programs enough for a whole chip.
    """
    known = rows if isinstance(rows, int) else _ANY_ROWS
    across = min(max(16, triton.next_power_of_2(known)), _ANY_ROWS)
    return {"BM": across, "BN": 32 if across == 16 else 64, "BK": 64, "num_warps": 4}


@triton_op("mxfp8::linear_portable", mutates_args=())
def _linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, native: bool) -> Tensor:
    """See ``mxfp8_ops.reference.linear``; arguments are checked already, M > 0. ``native``: whether the device converts
    e4m3 itself.
    """
    n, k = weight.shape
    flat = x.reshape(-1, k).contiguous()
    m = flat.shape[0]
    out = flat.new_empty((m, n))
    codes = weight.contiguous()
    codes = codes if native else codes.view(torch.uint8)
    offset = flat if bias is None else bias.contiguous()
    arguments = flat, codes, scale.contiguous(), offset, out, m, n, k
    if isinstance(m, int) and m <= gemv.MAX_ROWS:
        grid, constants = _gemv(flat, n, bias is not None, native)
        wrap_triton(gemv.mxfp8_linear_gemv)[grid](*arguments, **constants)
    else:
        sizes = configuration(m)
        grid = (_tiles(m, sizes["BM"]) * _tiles(n, sizes["BN"]),)
        wrap_triton(mxfp8_linear_portable)[grid](*arguments, HAS_BIAS=bias is not None, NATIVE=native, **sizes)
    return out.view(*x.shape[:-1], n)


linear = torch.ops.mxfp8.linear_portable.default


def _gemv(x: Tensor, n: int, has_bias: bool, native: bool) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of the kernel for a few rows, as ``gemv.linear`` has them."""
    m, k = x.shape
    outputs, elements, warps = gemv.configuration(k, m)
    together = min(triton.next_power_of_2(m), gemv.ROWS_A_PROGRAM)
    lowest, highest = gemv.FAST_SCALES[x.dtype]
    constants = {"M": together, "HAS_BIAS": has_bias, "NATIVE": native, "LOWEST": lowest, "HIGHEST": highest}
    constants |= {"BN": outputs, "BK": elements, "EXACT_BK": min(elements, 256), "num_warps": warps}
    return (_tiles(m, together) * _tiles(n, outputs),), constants


def _tiles(length: Any, size: int) -> Any:
    """``triton.cdiv``, also of a symbol."""
    return (length + size - 1) // size


@triton.jit
def mxfp8_linear_portable(
    x,  # pointer [M, K]
    weight,  # pointer [N, K]: e4m3, or its bytes
    scale,  # pointer [N, K / 32]
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Tiles with the same rows of the weight follow each other: it is in the cache then.
    down = tl.cdiv(M, BM)
    m = tl.program_id(0) % down * BM + tl.arange(0, BM)
    n = tl.program_id(0) // down * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    group = tl.arange(0, BK // 32)
    # Rows past the end are the last one again, and are not stored. K is a multiple of 32: saying so keeps loads wide.
    row_of_weight = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    row_of_x = tl.minimum(m, M - 1).to(tl.int64)[:, None]
    weights = weight + row_of_weight * (K // 32 * 32) + k[None, :]
    scales = scale + row_of_weight * (K // 32) + group[None, :]
    xs = x + row_of_x * (K // 32 * 32) + k[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        left = K - start
        code = tl.load(weights + start, mask=k[None, :] < left, other=0.0)
        power = tl.load(scales + start // 32, mask=group[None, :] * 32 < left, other=0)
        rows = tl.load(xs + start, mask=k[None, :] < left, other=0.0)
        value = code.to(tl.float32) if NATIVE else element_to_float32(code)
        value = tl.reshape(value, (BN, BK // 32, 32)) * scale_to_float32(power)[:, :, None]
        # The weight is the first operand: decoded in registers, it need not go through shared memory.
        total = tl.dot(tl.reshape(value, (BN, BK)).to(rows.dtype), tl.trans(rows), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])
