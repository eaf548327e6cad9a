"""The MX format: its constants, and the checks every operator makes of its arguments.

MXFP8 (OCP Microscaling Formats, MX v1.0): elements of ``float8_e4m3fn``, and for every block of 32
elements along the last axis one scale byte in E8M0, a power of two with bias 127. Byte 255 is NaN.

The checks run in the kernels and in the fakes alike, so a bad call fails with the same words in eager
mode, at trace time and under export. A wrong type is a TypeError, everything else a ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE = 32
"""Elements that share one scale."""

ELEMENT_DTYPE = torch.float8_e4m3fn
ELEMENT_MAX = 448.0
"""Largest finite e4m3 value, 1.75 * 2**8."""
ELEMENT_MAX_EXPONENT = 8
ELEMENT_NAN = 0x7F

SCALE_DTYPE = torch.uint8
"""How the operators carry E8M0 bytes. ``float8_e8m0fnu`` is viewed as this, never cast: a cast converts
numerically, so byte 127 (the value 1.0) would become byte 1."""
SCALE_BIAS = 127
SCALE_NAN = 255

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Activations, and the outputs of dequant."""

QUANTIZE_RULES = ("rceil", "floor")


def scale_bytes(scale: Tensor) -> Tensor:
    """Views ``float8_e8m0fnu`` scales as the uint8 bytes the operators take; returns others unchanged."""
    if isinstance(scale, Tensor) and scale.dtype == torch.float8_e8m0fnu:
        return scale.view(SCALE_DTYPE)
    return scale


def check_rule(rule: str) -> None:
    """Raises ValueError unless ``rule`` names a way to choose block scales."""
    if rule not in QUANTIZE_RULES:
        raise ValueError(f"unknown quantization rule {rule!r}: use one of {', '.join(QUANTIZE_RULES)}")


def check_compute_dtype(dtype: torch.dtype, what: str) -> None:
    """Raises TypeError unless ``dtype`` is float32, bfloat16 or float16."""
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{what} must be float32, bfloat16 or float16, got {dtype}")


def check_quantize(x: Tensor, rule: str) -> None:
    """Raises unless ``x`` can be quantized: a float tensor of whole blocks, none of it empty."""
    check_rule(rule)
    check_compute_dtype(x.dtype, "x")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    _check_blocks(x, "x")


def check_pair(weight: Tensor, scale: Tensor) -> None:
    """Raises unless ``weight [..., K]`` and ``scale [..., K/32]`` are one MXFP8 tensor."""
    if weight.dtype != ELEMENT_DTYPE:
        raise TypeError(f"weight must be float8_e4m3fn, got {weight.dtype}: see mxfp8_ops.quantize")
    if scale.dtype != SCALE_DTYPE:
        raise TypeError(_wrong_scale_dtype(scale.dtype))
    if weight.device != scale.device:
        raise ValueError(f"weight is on {weight.device}, scale on {scale.device}: move them to one device")
    if weight.dim() == 0:
        raise ValueError("weight must have at least one dimension, got a scalar")
    _check_blocks(weight, "weight")
    expected = (*weight.shape[:-1], weight.shape[-1] // BLOCK_SIZE)
    if tuple(scale.shape) != expected:
        raise ValueError(_wrong_scale_shape(weight, scale, expected))


def check_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Raises unless ``x [..., K]``, ``weight [N, K]``, ``scale [N, K/32]``, ``bias [N]`` fit together."""
    if weight.dim() != 2:
        raise ValueError(f"the weight of a linear must be [N, K], got {weight.dim()}-D {list(weight.shape)}")
    check_pair(weight, scale)
    check_compute_dtype(x.dtype, "x")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] for a weight of [{n}, {k}], got {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}: move them to one device")
    check_bias(bias, x, n, f" for a weight of [{n}, {k}]")


def check_bias(bias: Tensor | None, x: Tensor, n: int, why: str = "") -> None:
    """Raises unless ``bias`` is None or ``[N]`` in x's dtype and on its device. ``why``: what asks for that shape."""
    if bias is None:
        return
    if bias.dtype != x.dtype:
        raise TypeError(f"bias must have x's dtype {x.dtype}, got {bias.dtype}: cast it with bias.to(x.dtype)")
    if bias.dim() != 1 or bias.shape[0] != n:
        raise ValueError(f"bias must be [{n}]{why}, got {list(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}, x on {x.device}: move them to one device")


def _check_blocks(tensor: Tensor, name: str) -> None:
    k = tensor.shape[-1]
    if k == 0 or k % BLOCK_SIZE != 0:
        raise ValueError(
            f"the last dimension of {name} (K) must be a positive multiple of the block size {BLOCK_SIZE}, "
            f"got K={k} in {list(tensor.shape)}: pad it with zeros"
        )
    for dim, length in enumerate(tensor.shape[:-1]):
        if length == 0:
            raise ValueError(f"{name} is empty: dimension {dim} of {list(tensor.shape)} has length 0")


def _wrong_scale_dtype(dtype: torch.dtype) -> str:
    if dtype == torch.float8_e8m0fnu:
        return "scales must be E8M0 bytes as uint8, got float8_e8m0fnu: pass scale.view(torch.uint8)"
    hint = ": these look like dequantized or non-MX scales" if dtype.is_floating_point else ""
    return f"scales must be E8M0 bytes (uint8 or float8_e8m0fnu), got {dtype}{hint}"


def _wrong_scale_shape(weight: Tensor, scale: Tensor, expected: tuple[int, ...]) -> str:
    message = (
        f"scale must be {list(expected)} for a weight of {list(weight.shape)} "
        f"(one byte for {BLOCK_SIZE} elements along K), got {list(scale.shape)}"
    )
    if scale.dim() == 1 and weight.dim() > 1:
        message += ": a 1-D scale is swizzled or flattened, this package takes row-major scales"
    return message
