"""The public functions: thin twins of the registered operators, which do all checking."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, settings
from . import packed as packed_ops
from .format import check_rule, scale_bytes
from .packing import check_packed_for


def quantize(x: Tensor, rule: str = "rceil") -> tuple[Tensor, Tensor]:
    """Quantizes ``x`` to MXFP8 in blocks of 32 along its last axis. Not differentiable.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16; K a multiple of 32; contiguous or not.
        rule: how a block's scale follows from its largest magnitude ``amax``: "rceil" (the smallest power
            of two with ``amax / scale <= 448``) or "floor" (``2**(floor(log2(amax)) - 8)``, OCP MX v1.0
            section 6.3, where the largest elements may saturate).

    Returns:
        ``(weight, scale)``: ``[..., K]`` float8_e4m3fn and ``[..., K/32]`` uint8, both contiguous. Elements
        are rounded to nearest even and saturate at 448. A block with inf or NaN becomes scale 255, elements
        0x7f; a zero block scale 0, elements zero with their signs.

    Raises:
        TypeError: x is not of those dtypes. ValueError: K, an empty x, or an unknown rule.
    """
    check_rule(rule)
    settings.guard_compiled_graph()
    return ops.quantize(x, rule)


def dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``e4m3(weight) * 2**(scale - 127)``, computed exactly and rounded once.

    Args:
        weight: ``[..., K]`` float8_e4m3fn, contiguous or not.
        scale: ``[..., K/32]`` E8M0 bytes, uint8 or float8_e8m0fnu.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        ``[..., K]`` in ``dtype``, contiguous. Exact in float32; exact in bfloat16 for scale bytes 3..246 and
        in float16 for 112..134. Scale byte 255 gives NaN, element NaN stays NaN, zeros keep their sign.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, K not a multiple of 32, two devices,
        or a weight that requires a gradient.
    """
    settings.guard_compiled_graph()
    return ops.dequant(weight, scale_bytes(scale), dtype)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, dequant(weight, scale, x.dtype), bias)``, accumulated in float32 (W8A16).

    Differentiable in x and bias; the weight is frozen.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16, any leading dimensions including none or 0 rows.
        weight: ``[N, K]`` float8_e4m3fn.
        scale: ``[N, K/32]`` E8M0 bytes, uint8 or float8_e8m0fnu, row-major (not swizzled).
        bias: ``[N]`` in x's dtype, or None.

    Returns:
        ``[..., N]`` in x's dtype, contiguous. Under autocast x and bias are cast, the weight never is.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, K not a multiple of 32, N = 0, two
        devices, or a weight that requires a gradient.
    """
    settings.guard_compiled_graph()
    return ops.linear(x, weight, scale_bytes(scale), bias)


def pack(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight of a linear in the order in which the tensor cores of GPUs take it, for ``linear_packed``.

    A bijection: no bit is lost, see ``unpack``. One int32 tensor, of as many bytes as weight and scale together where
    N and K are multiples of 128, plus 128 or 256. Not differentiable.

    Args:
        weight: ``[N, K]`` float8_e4m3fn.
        scale: ``[N, K/32]`` E8M0 bytes, uint8 or float8_e8m0fnu.
        dtype: of the x that is to be multiplied, bfloat16 or float16. x of the other dtype gives the same as ever, but
            takes up to 15 % longer.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, K not a multiple of 32, two devices, a weight that
        requires a gradient, or another ``dtype`` than those.
    """
    settings.guard_compiled_graph()
    check_packed_for(dtype)
    return packed_ops.pack(weight, scale_bytes(scale), dtype)


def unpack(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The ``weight [n, k]`` float8_e4m3fn and ``scale [n, k/32]`` uint8 from which ``pack`` made ``packed``.

    Raises:
        TypeError, ValueError: ``packed`` is not a packed weight of n by k.
    """
    settings.guard_compiled_graph()
    return packed_ops.unpack(packed, n, k)


def linear_packed(x: Tensor, packed: Tensor, n: int, bias: Tensor | None = None) -> Tensor:
    """``linear(x, *unpack(packed, n, K), bias)``. GPUs compute from the packed weight; other devices unpack it first.

    Differentiable in x and bias.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16, any leading dimensions including none or 0 rows.
        packed: of a weight ``[n, K]``, from ``pack``.
        n: rows of the weight, N.
        bias: ``[N]`` in x's dtype, or None.

    Returns:
        ``[..., N]`` in x's dtype, contiguous. Under autocast x and bias are cast.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, or two devices.
    """
    settings.guard_compiled_graph()
    return packed_ops.linear_packed(x, packed, n, bias)
