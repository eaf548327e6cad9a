"""quantize against an oracle that computes in float64 and knows nothing of bit patterns."""

from __future__ import annotations

import pytest
import torch
from helpers import all_codes, assert_same, bits, element_values, round_once, scaled
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import reference

RULES = ("rceil", "floor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def oracle(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Elements and scale bytes of ``x [..., K]`` as the two rules define them, in float64."""
    blocks = x.double().unflatten(-1, (-1, 32))
    bad = ~blocks.isfinite().all(-1)
    amax = blocks.abs().amax(-1).masked_fill(bad, 1)
    exponent = torch.frexp(amax).exponent - 1 - 8  # of amax / 2^8: floor(log2(amax)) - 8
    if rule == "rceil":
        exponent = exponent + (scaled(amax, -exponent) > 448)
    byte = (exponent + 127).clamp(0, 254).masked_fill(amax == 0, 0)
    elements = round_once(scaled(blocks, 127 - byte.unsqueeze(-1)), torch.float8_e4m3fn, saturate=True)
    codes = elements.view(torch.uint8).masked_fill(bad.unsqueeze(-1), 0x7F)
    return codes.flatten(-2).view(torch.float8_e4m3fn), byte.masked_fill(bad, 255).to(torch.uint8)


def check(x: Tensor, rule: str) -> None:
    weight, scale = mxfp8_ops.quantize(x, rule)
    expected_weight, expected_scale = oracle(x, rule)
    assert_same(scale, expected_scale)
    assert_same(weight, expected_weight)


def blocks_led_by(amax: Tensor, seed: int = 0) -> Tensor:
    """``[len(amax), 32]``: each block has one of the values and 31 of at most its magnitude, of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(amax.numel(), 32, generator=generator, dtype=torch.float64) * 2 - 1
    share = scaled(share, -torch.randint(0, 12, share.shape, generator=generator))
    x = (amax.double().unsqueeze(-1).nan_to_num(1, 1, 1) * share).to(amax.dtype)
    x[torch.arange(len(x)), torch.arange(len(x)) % 32] = amax
    return x


def every_value_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_short_format_as_the_largest_of_its_block(dtype: torch.dtype, rule: str) -> None:
    check(blocks_led_by(every_value_of(dtype)), rule)


@pytest.mark.parametrize("rule", RULES)
def test_float32_next_to_448_times_every_power_of_two(rule: str) -> None:
    edges = scaled(torch.tensor(448.0), torch.arange(-157, 120)).float()
    ulps = torch.arange(-64, 65, dtype=torch.int32)
    amax = (edges.view(torch.int32).unsqueeze(-1) + ulps).flatten()
    check(blocks_led_by(amax[amax >= 0].view(torch.float32)), rule)


@pytest.mark.parametrize("rule", RULES)
def test_float32_next_to_every_power_of_two(rule: str) -> None:
    edges = scaled(torch.tensor(1.0), torch.arange(-149, 128)).float()
    ulps = torch.arange(-2, 3, dtype=torch.int32)
    amax = (edges.view(torch.int32).unsqueeze(-1) + ulps).flatten()
    check(blocks_led_by(amax[amax >= 0].view(torch.float32)), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_blocks_of_all_magnitudes(dtype: torch.dtype, rule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = {torch.float16: (-24, 11), torch.float32: (-149, 120), torch.bfloat16: (-133, 120)}[dtype]
    exponent = torch.randint(*spread, (4096, 1), generator=generator)
    x = scaled(torch.randn(4096, 96, generator=generator), exponent).to(dtype)
    check(x, rule)


@pytest.mark.parametrize("rule", RULES)
def test_float32_at_and_beside_every_rounding_tie(rule: str) -> None:
    grid = element_values()[:127]
    ties = ((grid[1:] + grid[:-1]) / 2).float().view(torch.int32)
    values = torch.cat([ties, ties - 1, ties + 1, grid.float().view(torch.int32)]).view(torch.float32)
    values = torch.cat([values, -values])
    x = torch.zeros(len(values), 32)
    x[:, 0], x[:, 1] = 448, values  # 448 makes the scale 1, except under "floor", where it is 1 as well
    for power in (-120, -30, 0, 1, 110):
        check(x * 2.0**power, rule)
    assert (mxfp8_ops.quantize(x, rule)[1] == 127).all()


@pytest.mark.parametrize("rule", RULES)
def test_every_bfloat16_value_as_an_element_under_scale_one(rule: str) -> None:
    values = every_value_of(torch.bfloat16)
    values = values[values.abs() <= 448]
    x = torch.full((len(values), 32), 448.0, dtype=torch.bfloat16)
    x[:, 7] = values
    check(x, rule)
    assert (mxfp8_ops.quantize(x, rule)[1] == 127).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_range(dtype: torch.dtype, rule: str) -> None:
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    amax = [info.max, -info.max, info.smallest_normal, -info.smallest_normal, subnormal, -subnormal, 3 * subnormal]
    check(blocks_led_by(torch.tensor(amax, dtype=dtype)), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks_get_scale_zero_and_keep_their_signs(dtype: torch.dtype, rule: str) -> None:
    weight, scale = mxfp8_ops.quantize(torch.tensor([0.0, -0.0] * 32, dtype=dtype), rule)
    assert scale.tolist() == [0, 0]
    assert bits(weight).tolist() == [0x00, 0x80] * 32


@pytest.mark.parametrize("rule", RULES)
def test_small_elements_that_round_to_zero_keep_their_signs(rule: str) -> None:
    x = torch.full((32,), -1e-10)
    x[0] = 1
    assert bits(mxfp8_ops.quantize(x, rule)[0]).tolist() == [0x78] + [0x80] * 31


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_inf_or_nan_spoils_its_block_only(value: float, dtype: torch.dtype, rule: str) -> None:
    x = torch.ones(2, 96, dtype=dtype)
    x[1, 40] = value
    weight, scale = mxfp8_ops.quantize(x, rule)
    assert scale.tolist() == [[119] * 3, [119, 255, 119]]
    assert bits(weight).unique().tolist() == [0x78, 0x7F]
    assert (bits(weight)[1, 32:64] == 0x7F).all()
    assert int((bits(weight) == 0x7F).sum()) == 32


@pytest.mark.parametrize("rule", RULES)
def test_every_float32_nan_is_noticed(rule: str) -> None:
    payloads = torch.cat([torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF]), torch.tensor([-1, -(2**22), -8388607])])
    x = torch.ones(6, 32)
    x[:, 31] = payloads.to(torch.int32).view(torch.float32)
    assert x[:, 31].isnan().all()
    assert (mxfp8_ops.quantize(x, rule)[1] == 255).all()


def test_rceil_never_saturates_and_floor_does() -> None:
    x = torch.full((32,), 449.0)
    weight, scale = mxfp8_ops.quantize(x)
    assert (weight.float()[0], scale.item()) == (224, 128)
    weight, scale = mxfp8_ops.quantize(torch.full((32,), 511.0), "floor")
    assert (weight.float()[0], scale.item()) == (448, 127)


def test_rceil_is_the_default() -> None:
    x = torch.full((32,), 500.0)
    for default, named in zip(mxfp8_ops.quantize(x), mxfp8_ops.quantize(x, "rceil"), strict=True):
        assert_same(default, named)


@pytest.mark.parametrize("rule", RULES)
def test_op_function_and_reference_are_one(rule: str) -> None:
    x = blocks_led_by(every_value_of(torch.float16)[::7].contiguous())
    for quantize in (torch.ops.mxfp8.quantize, reference.quantize):
        for actual, expected in zip(quantize(x, rule), mxfp8_ops.quantize(x, rule), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("shape", [(64,), (3, 32), (2, 3, 96), (2, 1, 3, 64)])
def test_blocks_run_along_the_last_axis_at_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight, scale = mxfp8_ops.quantize(x)
    for actual, rows in zip((weight, scale), mxfp8_ops.quantize(x.reshape(-1, 32)), strict=True):
        assert_same(actual, rows.reshape(actual.shape))
    check(x, "rceil")


@pytest.mark.parametrize("rule", RULES)
def test_strides_do_not_matter(rule: str) -> None:
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(3))
    views = [x.t(), x[:, ::2], x[::3], x[:, :96], x[:, 7:71], x[:1].expand(4, 192), x[:, :1].expand(64, 64)]
    for view in views:
        assert not view.is_contiguous() or view.storage_offset() > 0 or view.shape != x.shape
        for actual, expected in zip(
            mxfp8_ops.quantize(view, rule), mxfp8_ops.quantize(view.clone().contiguous(), rule), strict=True
        ):
            assert actual.is_contiguous()
            assert_same(actual, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_changes_nothing_the_second_time(dtype: torch.dtype, rule: str) -> None:
    # bfloat16 cannot hold values under scales 0 to 2, nor float32 those that round up to 2^128: both stay out.
    amax = every_value_of(dtype)[::5] if dtype != torch.float32 else 2.0 ** torch.arange(-115, 115)
    amax = amax[(amax.abs() < 2.0**120) & (amax.abs() > 2.0**-110)]
    once = mxfp8_ops.dequant(*mxfp8_ops.quantize(blocks_led_by(amax), rule), torch.float32)
    twice = mxfp8_ops.dequant(*mxfp8_ops.quantize(once, rule), torch.float32)
    assert_same(twice, once)


def test_every_finite_value_of_the_format_survives_quantize() -> None:
    weight, scale = all_codes()
    codes = weight.view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    values = mxfp8_ops.dequant(codes.view(torch.float8_e4m3fn)[:247], scale[:247], torch.float32)
    assert_same(mxfp8_ops.dequant(*mxfp8_ops.quantize(values), torch.float32), values)


def test_quantize_of_a_trained_parameter_needs_no_detach() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 64))
    for tensor in mxfp8_ops.quantize(parameter):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    assert parameter.requires_grad
