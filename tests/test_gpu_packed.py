"""Linear on packed and on canonical weights on a CUDA device: the bits of the reference, for every code and shape.

Kernels take seconds to compile, and each anew for N that are multiples of 16, for a bias, and for each dtype. So most
tests have a bias and an N that is no such multiple, or neither.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    all_codes,
    assert_same,
    exact_linear_inputs,
    expected_from_float64,
)
from torch import Tensor, nn

import mxfp8_ops
from mxfp8_ops import Mxfp8Linear, ops, packing, reference

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import one_code_a_row, what_codes_mean
from on_chip import (
    DTYPE,
    DTYPES,
    EACH_FORM,
    EACH_KERNEL,
    FORM,
    HOPPER,
    SHORT,
    in_sixteens,
    linear,
    on_device,
    packed_on_device,
    put,
)

from mxfp8_ops.gpu import dispatch, hopper, replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
M = (0, 1, 2, 5, 8, 9, 17, 33, 64, 65, 129, 200, 257, 300, 513)
SHAPES = [
    *((True, n, k) for n, k in ((1, 32), (7, 96), (33, 288), (257, 1056), (300, 4128), (4097, 128), (1024, 4096))),
    *((False, n, k) for n, k in ((1, 128), (7, 96), (7, 384), (288, 1024), (300, 4128), (4097, 128), (1024, 4096))),
]
"""Packed or not, N, K. Where K is no multiple of 128, canonical weights are left to other kernels."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of x in every call of the kernels for Hopper."""
    found: list[int] = []

    def count(name: str) -> None:
        compute = getattr(hopper, name)

        def counted(x: Tensor, *args: Any) -> Tensor:
            found.append(len(x))
            return compute(x, *args)

        monkeypatch.setattr(hopper, name, counted)

    count("linear_packed")
    count("linear")
    replay.forget()
    return found


# --- every code -----------------------------------------------------------------------------------------------------


@EACH_FORM
@DTYPE
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_every_element_under_every_scale_is_exact(dtype: torch.dtype, m: int, packed_for: torch.dtype | None) -> None:
    weight, scale = one_code_a_row(range(256), 256)
    x = torch.ones(m, 256, dtype=dtype, device="cuda")
    actual = linear(x, put(weight, scale, packed_for is not None, packed_for or dtype), len(weight))
    expected = what_codes_mean(weight, scale, dtype)
    assert_same(actual.cpu(), expected.expand(m, -1))


@pytest.mark.parametrize("packed_for", packing.PACKED_FOR)
@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_every_element_under_every_scale_that_is_decoded_fast_is_exact(
    dtype: torch.dtype, m: int, packed_for: torch.dtype
) -> None:
    scales = range(135) if dtype == torch.bfloat16 else range(95, 135)
    weight, scale = one_code_a_row(scales, 288, nan=False)
    if dtype == torch.float16:  # under smaller scales elements that are zero are decoded fast too
        zeros = torch.tensor([0x00, 0x80], dtype=torch.uint8).repeat(95)[:, None].repeat(1, 288)
        weight = torch.cat([weight.view(torch.uint8), zeros]).view(weight.dtype)
        scale = torch.cat([scale, torch.arange(95, dtype=torch.uint8).repeat_interleave(2)[:, None].repeat(1, 9)])
    weight, scale = in_sixteens(weight, scale)
    on_chip = packed_on_device(weight, scale, packed_for)
    assert not packing.exact_marks(on_chip)[DTYPES.index(dtype)]
    actual = mxfp8_ops.linear_packed(torch.ones(m, 288, dtype=dtype, device="cuda"), on_chip, len(weight))
    assert_same(actual.cpu(), what_codes_mean(weight, scale, dtype).expand(m, -1))


@FORM
@DTYPE
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_every_code_meets_the_column_of_x_that_is_its_own(dtype: torch.dtype, m: int, packed: bool) -> None:
    """Rows of the identity pick one element each; without NaN elements, which would be all that is left."""
    weight, scale = all_codes()
    weight.view(torch.uint8)[weight.isnan()] = 0
    expected = expected_from_float64(weight, scale, dtype).T
    spoilt = expected.isinf().any(0) | expected.isnan().any(0)  # infinity times zero: such an output is NaN, or it
    eye, on_chip = torch.eye(256, dtype=dtype, device="cuda"), put(weight, scale, packed, dtype)
    actual = torch.cat([linear(x, on_chip, 256) for x in eye.split(m)]).cpu()
    assert_same(actual[:, ~spoilt], (expected[:, ~spoilt].double() + 0.0).to(dtype))  # a sum is never -0
    assert actual[:, spoilt].isnan().any(0).all()
    assert (~actual[:, spoilt].isfinite()).all()


@DTYPE
def test_unpack_on_the_device_gives_back_every_bit(dtype: torch.dtype) -> None:
    for weight, scale in (all_codes(), exact_linear_inputs(1, 257, 1056, dtype)[1:3]):
        on_chip = packed_on_device(weight, scale, dtype)
        assert_same(on_chip.cpu(), mxfp8_ops.pack(weight, scale, packing.packed_for(on_chip)))
        for actual, expected in zip(mxfp8_ops.unpack(on_chip, *weight.shape), (weight, scale), strict=True):
            assert_same(actual.cpu(), expected)


# --- every shape ----------------------------------------------------------------------------------------------------


@DTYPE
@pytest.mark.parametrize(("packed", "n", "k"), SHAPES)
def test_linear_is_exact_for_any_rows_strides_and_addresses(dtype: torch.dtype, packed: bool, n: int, k: int) -> None:
    for m in M:
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        expected = reference.linear(x, weight, scale, bias)
        without_bias = reference.linear(x, weight, scale)
        on_chip = put(weight, scale, packed, dtype)
        x, bias = on_device(x, bias)
        assert_same(linear(x, on_chip, n, bias).cpu(), expected)
        if n in (300, 1024):
            assert_same(linear(x, on_chip, n).cpu(), without_bias)
        strided = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        assert_same(linear(strided, on_chip, n, bias).cpu(), expected)
        shifted = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(m, k)
        assert m == 0 or shifted.data_ptr() % 16 == x.element_size()
        assert_same(linear(shifted, on_chip, n, bias).cpu(), expected)


@FORM
@DTYPE
def test_any_leading_dimensions(dtype: torch.dtype, packed: bool) -> None:
    x, weight, scale, bias = exact_linear_inputs(24, 33, 384, dtype)
    expected = reference.linear(x, weight, scale, bias)
    on_chip, x, bias = put(weight, scale, packed, dtype), *on_device(x, bias)
    for shape in ((24,), (2, 12), (2, 1, 3, 4)):
        actual = linear(x.view(*shape, 384), on_chip, 33, bias)
        assert_same(actual.cpu(), expected.view(*shape, 33))
    turned = x.view(4, 6, 384).transpose(0, 1)
    assert_same(linear(turned, on_chip, 33, bias).cpu(), expected.view(4, 6, 33).transpose(0, 1))
    assert_same(linear(x[5], on_chip, 33, bias).cpu(), expected[5])
    assert linear(x[:0].view(0, 3, 384), on_chip, 33, bias).shape == (0, 3, 33)


@FORM
@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_bias_and_weight_may_lie_anywhere(dtype: torch.dtype, m: int, packed: bool) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, 384, dtype)
    expected = reference.linear(x, weight, scale, bias)
    on_chip, x, bias = put(weight, scale, packed, dtype), *on_device(x, bias)
    strided = torch.stack([bias, bias + 1], -1)[:, 0]
    shifted = torch.cat([bias[:1], bias])[1:]
    for each in (strided, shifted):
        assert_same(linear(x, on_chip, 300, each).cpu(), expected)
    moved = moved_by_one(on_chip) if isinstance(on_chip, Tensor) else tuple(map(moved_by_one, on_chip))
    assert_same(linear(x, moved, 300, bias).cpu(), expected)
    assert_same(linear(x, on_chip, 300, bias[:1].expand(300)).cpu()[:, 0], expected[:, 0])
    if not isinstance(on_chip, Tensor):
        turned = tuple(each.T.contiguous().T for each in on_chip)
        assert_same(linear(x, turned, 300, bias).cpu(), expected)


def moved_by_one(tensor: Tensor) -> Tensor:
    """The same at the address of its second element."""
    flat = tensor.contiguous().view(-1)
    return torch.empty(len(flat) + 1, dtype=tensor.dtype, device=tensor.device)[1:].copy_(flat).view(tensor.shape)


@FORM
def test_float32_and_the_switch_do_without_the_kernels(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    for m in EACH_KERNEL:
        for dtype in DTYPES:
            x, weight, scale, bias = exact_linear_inputs(m, 300, 1024, dtype)
            on_chip, (x, bias) = put(weight, scale, packed, dtype), on_device(x, bias)
            with monkeypatch.context() as patch:
                expected = linear(x, on_chip, 300, bias)
                used = len(calls)
                patch.setenv("MXFP8_KERNELS", "off")
                assert ops.kernel_name("linear", x.device) == "reference"
                assert_same(linear(x, on_chip, 300, bias), expected)
                assert len(calls) == used
    if torch.cuda.get_device_capability() == (9, 0):
        assert calls == [m for m in EACH_KERNEL for _ in DTYPES[:2] if packed or m > 8]
    else:
        assert calls == []


@HOPPER
def test_canonical_weights_of_other_lengths_and_for_many_rows_do_without_the_kernels(calls: list[int]) -> None:
    for m, k, used in ((16, 384, True), (6144, 128, True), (6145, 128, False), (16, 96, False), (200, 4128, False)):
        x, weight, scale, bias = exact_linear_inputs(m, 300, k, torch.bfloat16)
        calls.clear()
        actual = linear(x.cuda(), put(weight, scale, False, torch.bfloat16), 300, bias.cuda())
        assert_same(actual.cpu(), reference.linear(x, weight, scale, bias))
        assert calls == ([m] if used else [])


@HOPPER
def test_the_kernels_for_hopper_are_those_that_ran() -> None:
    """Otherwise nothing in this file has tested them."""
    assert dispatch._hopper_kernels(torch.device("cuda", torch.cuda.current_device())) is hopper


# --- modules --------------------------------------------------------------------------------------------------------


@DTYPE
def test_a_packed_module_on_the_device_equals_the_canonical_one(dtype: torch.dtype) -> None:
    for m in (0, *EACH_KERNEL):
        x, weight, scale, bias = exact_linear_inputs(m, 300, 1056, dtype)
        module = Mxfp8Linear.from_quantized(weight, scale, bias).cuda()
        expected = module(x.cuda())
        module.pack_()
        assert_same(module(x.cuda()), expected)
        assert_same(module.weight.cpu(), weight)
        assert_same(module.unpack_()(x.cuda()), expected)
        assert_same(module.weight.cpu(), weight)
        assert_same(module.weight_scale.cpu(), scale)


def test_packing_a_model_takes_the_memory_of_one_layer_more_at_most() -> None:
    side, layers = 12288, 3
    one = packing.packed_shape(side, side)[0] * packing.WORDS * 4

    def made() -> Mxfp8Linear:
        weight = torch.full((side, side), 0x38, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        return Mxfp8Linear.from_quantized(weight, torch.full((side, side // 32), 127, dtype=torch.uint8).cuda())

    before = torch.cuda.memory_allocated()
    model = nn.Sequential(*(made() for _ in range(layers)))
    assert abs(torch.cuda.memory_allocated() - before - layers * one) < one / 100
    torch.cuda.reset_peak_memory_stats()
    assert mxfp8_ops.pack_(model) == layers
    assert abs(torch.cuda.memory_allocated() - before - layers * one) < one / 100
    chunks = 96 * 2**20  # what is packed at a time, in some intermediate results
    assert torch.cuda.max_memory_allocated() - before <= (layers + 1) * one + chunks < (layers + 2) * one


@FORM
def test_linear_takes_no_memory_but_the_result_and_sums_of_parts(packed: bool) -> None:
    weight = torch.full((8192, 8192), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    on_chip = put(weight, torch.full((8192, 256), 127, dtype=torch.uint8), packed, torch.bfloat16)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("without kernels for so many rows weights are dequantized")
    for m in EACH_KERNEL:
        x = torch.ones(m, 8192, dtype=torch.bfloat16, device="cuda")
        linear(x, on_chip, 8192)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear(x, on_chip, 8192)
        assert torch.cuda.max_memory_allocated() - before <= m * 8192 * (2 + 4 * 5) + 2**20  # five parts at most
