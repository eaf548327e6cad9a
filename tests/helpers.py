"""What several test files share: every code of the format, an oracle in float64, exact linear inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POWERS_OF_TWO = torch.tensor([math.ldexp(1.0, exponent) for exponent in range(-400, 401)], dtype=torch.float64)

# dtype: (bits of precision, exponent of the smallest normal, largest finite value)
_FORMATS = {
    torch.float32: (24, -126, 2.0**128 - 2.0**104),
    torch.bfloat16: (8, -126, 2.0**128 - 2.0**120),
    torch.float16: (11, -14, 65504.0),
    torch.float8_e4m3fn: (4, -6, 448.0),
}


def scaled(values: Tensor, exponent: Tensor) -> Tensor:
    """``values * 2**exponent``, exact in float64 where torch.ldexp goes through a float32 power."""
    return values * _POWERS_OF_TWO[exponent + 400]


def all_codes() -> tuple[Tensor, Tensor]:
    """``weight [256, 256]`` and ``scale [256, 8]``: row s holds every element under scale byte s."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.repeat(256, 1).view(torch.float8_e4m3fn), codes[:, None].expand(256, 8).contiguous()


def finite_codes() -> tuple[Tensor, Tensor]:
    """``weight [244, 256]`` and ``scale [244, 8]`` of scale bytes 3 to 246, the NaN elements replaced by
    zeros: every value is finite and exact in bfloat16 and float32.
    """
    weight, scale = all_codes()
    codes = weight.view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    return codes.view(torch.float8_e4m3fn)[3:247], scale[3:247]


def element_values() -> Tensor:
    """``[256]`` float64: what each e4m3 code means, from the definition of the format."""
    codes = torch.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7).double()
    magnitude = torch.where(exponent > 0, 8 + mantissa, mantissa)
    magnitude = scaled(magnitude, exponent.clamp(min=1) - 10)
    magnitude[codes & 0x7F == 0x7F] = torch.nan
    return torch.where(codes < 128, magnitude, -magnitude)


def float64_values(weight: Tensor, scale: Tensor) -> Tensor:
    """``e4m3(weight) * 2**(scale - 127)`` without any rounding, ``[..., K]`` float64; scale 255 is NaN."""
    exponent = scale.view(torch.uint8).long().repeat_interleave(32, -1)
    values = scaled(element_values()[weight.contiguous().view(torch.uint8).long()], exponent - 127)
    return values.masked_fill(exponent == 255, torch.nan)


def round_once(values: Tensor, dtype: torch.dtype, saturate: bool = False) -> Tensor:
    """float64 ``values`` to the nearest of ``dtype``, ties to even, in one step. Torch's own cast from
    float64 to the short formats goes through float32 and rounds twice.
    """
    precision, smallest_exponent, largest = _FORMATS[dtype]
    exponent = torch.frexp(values.nan_to_num(1, 1, 1)).exponent.clamp(min=smallest_exponent + 1)
    unit = scaled(torch.ones_like(values), exponent - precision)
    rounded = torch.where(values.isfinite(), torch.round(values / unit) * unit, values)
    if saturate:
        return rounded.clamp(-largest, largest).to(dtype)
    return torch.where(rounded.abs() > largest, rounded.sign() * torch.inf, rounded).to(dtype)


def expected_from_float64(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What dequant must give, ``[..., K]`` in ``dtype``."""
    return round_once(float64_values(weight, scale), dtype)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as integers of its own width; every NaN of a float dtype as the same one."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype.is_floating_point and tensor.element_size() > 1:
        tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, device, shape and values, bit for bit: NaN equals NaN, -0 differs from 0, strides are free."""
    assert actual.dtype == expected.dtype
    assert actual.device == expected.device
    assert actual.shape == expected.shape
    differs = bits(actual) != bits(expected)
    if differs.any():
        where = differs.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} differ, the first at {where}: "
            f"{actual[tuple(where)].item()} instead of {expected[tuple(where)].item()}"
        )


def exact_linear_inputs(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x [m, k]``, ``weight [n, k]``, ``scale [n, k/32]``, ``bias [n]`` whose linear has the same bits in any
    order of summation: at most 40 products of at most 6, and a bias of at most 16, stay integers below
    257, which every dtype holds exactly.

    The scales still differ along n and k, by factors that x takes back along k, so a scale applied to the
    wrong block shows.
    """
    generator = torch.Generator().manual_seed(1000003 * m + 1009 * n + k)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    exponents = integers(-4, 4, k // 32)
    used = torch.rand(m, k, generator=generator).argsort(-1) < 40
    x = torch.where(used, 2 * integers(0, 1, m, k) - 1, 0).double()
    x = scaled(x, -exponents.repeat_interleave(32)).to(dtype)
    weight = integers(-3, 3, n, k).to(torch.float32).to(torch.float8_e4m3fn)
    scale = (127 + exponents + integers(0, 1, n, k // 32)).to(torch.uint8)
    return x, weight, scale, integers(-16, 16, n).to(dtype)
