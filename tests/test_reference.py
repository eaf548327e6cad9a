"""dequant and linear on all 256 elements x 256 scales, against float64, with no tolerance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import all_codes, assert_same, expected_from_float64, finite_codes, float64_values, round_once
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

DEQUANTS = {
    "reference": reference.dequant,
    "op": torch.ops.mxfp8.dequant,
    "function": mxfp8_ops.dequant,
    "function_on_e8m0": lambda weight, scale, dtype: mxfp8_ops.dequant(weight, scale.view(torch.float8_e8m0fnu), dtype),
}

LINEARS = {
    "reference": reference.linear,
    "op": lambda x, weight, scale: torch.ops.mxfp8.linear(x, weight, scale, None),
    "function": mxfp8_ops.linear,
    "function_on_e8m0": lambda x, weight, scale: mxfp8_ops.linear(x, weight, scale.view(torch.float8_e8m0fnu)),
}

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def scale_bytes_exact_in(dtype: torch.dtype) -> set[int]:
    """Under which scale bytes every finite element survives dequant unchanged."""
    weight, scale = all_codes()
    exact = float64_values(weight, scale)
    lossless = (mxfp8_ops.dequant(weight, scale, dtype).double() == exact) | weight.float().isnan()
    return set(lossless.all(-1).nonzero().flatten().tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dequant", DEQUANTS.values(), ids=DEQUANTS)
def test_dequant_of_every_code_is_rounded_once(dequant: Callable[..., Tensor], dtype: torch.dtype) -> None:
    weight, scale = all_codes()
    assert_same(dequant(weight, scale, dtype), expected_from_float64(weight, scale, dtype))


def test_dequant_gives_bfloat16_by_default() -> None:
    weight, scale = all_codes()
    expected = expected_from_float64(weight, scale, torch.bfloat16)
    assert_same(mxfp8_ops.dequant(weight, scale), expected)
    assert_same(reference.dequant(weight, scale), expected)


def test_oracle_agrees_with_values_from_the_specification() -> None:
    weight, scale = all_codes()
    values = float64_values(weight, scale)
    assert values[127, 0x38] == 1.0
    assert values[127, 0x7E] == 448.0
    assert values[127, 0x01] == 2.0**-9
    assert values[0, 0x38] == 2.0**-127
    assert values[254, 0xFE] == -448.0 * 2.0**127
    assert values[:, [0x7F, 0xFF]].isnan().all()
    assert values[255].isnan().all()


def test_oracle_rounds_halves_to_even_and_never_twice() -> None:
    # 1 + 2^-8 is halfway between two bfloat16 neighbours; 2^-40 more is lost in float32, not here.
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-40, 65520.0], dtype=torch.float64)
    assert round_once(values, torch.bfloat16).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, 65536.0]
    assert round_once(values[3], torch.float16).item() == torch.inf


def test_scale_byte_zero_is_a_subnormal_not_zero() -> None:
    one = torch.full((1, 32), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    zero_byte = torch.zeros(1, 1, dtype=torch.uint8)
    assert mxfp8_ops.dequant(one, zero_byte, torch.float32).double().unique().tolist() == [2.0**-127]
    assert mxfp8_ops.dequant(one, zero_byte, torch.bfloat16).double().unique().tolist() == [2.0**-127]
    assert reference.scale_to_float32(zero_byte).double().item() == 2.0**-127


def test_scale_byte_255_is_nan_for_its_block_only() -> None:
    ones = torch.full((1, 96), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 255, 128]], dtype=torch.uint8)
    values = mxfp8_ops.dequant(ones, scale, torch.float32).flatten()
    assert (values[:32] == 1).all()
    assert values[32:64].isnan().all()
    assert (values[64:] == 2).all()


def test_zeros_keep_their_sign() -> None:
    zeros = torch.tensor([0x00, 0x80] * 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for byte in (0, 127, 254):
        signs = mxfp8_ops.dequant(zeros, torch.tensor([byte], dtype=torch.uint8), torch.float16).signbit()
        assert signs.tolist() == [False, True] * 16


def test_bfloat16_is_exact_for_scale_bytes_3_to_246_and_no_others() -> None:
    assert scale_bytes_exact_in(torch.bfloat16) == set(range(3, 247))


def test_float16_is_exact_for_scale_bytes_112_to_134_and_no_others() -> None:
    assert scale_bytes_exact_in(torch.float16) == set(range(112, 135))


def test_float32_is_exact_until_it_overflows() -> None:
    assert scale_bytes_exact_in(torch.float32) == set(range(247))


@pytest.mark.parametrize("shape", [(32,), (2, 64), (2, 3, 32), (2, 1, 3, 96)])
def test_dequant_takes_any_rank(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    scale = torch.randint(256, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, generator=generator)
    values = mxfp8_ops.dequant(weight, scale, torch.float32)
    assert_same(values, expected_from_float64(weight, scale, torch.float32))


@pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS)
def test_linear_of_the_identity_is_the_dequantized_weight(linear: Linear) -> None:
    weight, scale = finite_codes()
    expected = expected_from_float64(weight, scale, torch.float32) + 0.0  # a sum with zeros loses the sign of -0
    assert_same(linear(torch.eye(256), weight, scale), expected.T)


@pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS)
def test_linear_sees_every_code_alone_in_its_row(linear: Linear) -> None:
    codes, scales = all_codes()
    weight = torch.zeros(65536, 32, dtype=torch.uint8)
    weight[:, 5] = codes.view(torch.uint8).flatten()
    scale = scales.view(torch.uint8)[:, :1].repeat_interleave(256, 0)
    x = torch.zeros(32)
    x[5] = 1
    expected = expected_from_float64(codes, scales, torch.float32).flatten() + 0.0
    assert_same(linear(x, weight.view(torch.float8_e4m3fn), scale), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_the_identity_is_exact_in_short_formats(dtype: torch.dtype) -> None:
    weight, scale = finite_codes()
    # The scales between which nothing is subnormal: short-format dot products may flush those.
    low, high = {torch.bfloat16: (10, 246), torch.float16: (122, 134)}[dtype]
    weight, scale = weight[low - 3 : high - 2], scale[low - 3 : high - 2]
    expected = expected_from_float64(weight, scale, dtype) + 0.0
    assert_same(mxfp8_ops.linear(torch.eye(256, dtype=dtype), weight, scale), expected.T)
