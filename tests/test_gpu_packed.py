"""Linear on packed weights on a CUDA device: the bits of the reference, from every kernel and every plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs, expected_from_float64
from torch import Tensor, nn

import mxfp8_ops
from mxfp8_ops import Mxfp8Linear, ops, packing, reference

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import one_code_a_row, what_codes_mean

from mxfp8_ops.gpu import dispatch, packed, plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper chip"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16", "float32"])
SHORT = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["bfloat16", "float16"])
EACH_KERNEL = (1, 3, 8, 16, 64, 128, 256)
"""Rows of x that between them meet all kernels."""
M = (0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65, 128, 129, 200, 256, 300, 513)
SHAPES = ((1, 32), (7, 96), (33, 288), (257, 1056), (300, 4128), (4097, 128), (64, 4096), (1024, 4096))


def on_device(*tensors: Tensor) -> Iterator[Tensor]:
    return (tensor.cuda() for tensor in tensors)


def packed_on_device(weight: Tensor, scale: Tensor) -> Tensor:
    return mxfp8_ops.pack(*on_device(weight, scale))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of x in every call of the kernels for Hopper."""
    found: list[int] = []
    linear = packed.linear

    def counted(x: Tensor, *args: Any) -> Tensor:
        found.append(len(x))
        return linear(x, *args)

    monkeypatch.setattr(packed, "linear", counted)
    return found


# --- every code -----------------------------------------------------------------------------------------------------


@DTYPE
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_every_element_under_every_scale_is_exact(dtype: torch.dtype, m: int) -> None:
    weight, scale = one_code_a_row(range(256), 288)
    actual = mxfp8_ops.linear_packed(
        torch.ones(m, 288, dtype=dtype, device="cuda"), packed_on_device(weight, scale), len(weight)
    )
    expected = what_codes_mean(weight, scale, dtype)
    assert_same(actual.cpu(), expected.expand(m, -1))


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_every_element_under_every_scale_that_is_decoded_fast_is_exact(dtype: torch.dtype, m: int) -> None:
    scales = range(135) if dtype == torch.bfloat16 else range(95, 135)
    weight, scale = one_code_a_row(scales, 288, nan=False)
    if dtype == torch.float16:  # under smaller scales elements that are zero are decoded fast too
        zeros = torch.tensor([0x00, 0x80], dtype=torch.uint8).repeat(95)[:, None].repeat(1, 288)
        weight = torch.cat([weight.view(torch.uint8), zeros]).view(weight.dtype)
        scale = torch.cat([scale, torch.arange(95, dtype=torch.uint8).repeat_interleave(2)[:, None].repeat(1, 9)])
    on_chip = packed_on_device(weight, scale)
    assert not on_chip[-1, DTYPES.index(dtype)]
    actual = mxfp8_ops.linear_packed(torch.ones(m, 288, dtype=dtype, device="cuda"), on_chip, len(weight))
    assert_same(actual.cpu(), what_codes_mean(weight, scale, dtype).expand(m, -1))


@DTYPE
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_every_code_meets_the_column_of_x_that_is_its_own(dtype: torch.dtype, m: int) -> None:
    """Rows of the identity pick one element each; without NaN elements, which would be all that is left."""
    weight, scale = all_codes()
    weight.view(torch.uint8)[weight.isnan()] = 0
    expected = expected_from_float64(weight, scale, dtype).T
    spoilt = expected.isinf().any(0) | expected.isnan().any(0)  # infinity times zero: such an output is NaN, or it
    eye, on_chip = torch.eye(256, dtype=dtype, device="cuda"), packed_on_device(weight, scale)
    actual = torch.cat([mxfp8_ops.linear_packed(x, on_chip, 256) for x in eye.split(m)]).cpu()
    assert_same(actual[:, ~spoilt], (expected[:, ~spoilt].double() + 0.0).to(dtype))  # a sum is never -0
    assert actual[:, spoilt].isnan().any(0).all()
    assert (~actual[:, spoilt].isfinite()).all()


@DTYPE
def test_unpack_on_the_device_gives_back_every_bit(dtype: torch.dtype) -> None:
    for weight, scale in (all_codes(), exact_linear_inputs(1, 257, 1056, dtype)[1:3]):
        on_chip = packed_on_device(weight, scale)
        assert_same(on_chip.cpu(), mxfp8_ops.pack(weight, scale))
        for actual, expected in zip(mxfp8_ops.unpack(on_chip, *weight.shape), (weight, scale), strict=True):
            assert_same(actual.cpu(), expected)


# --- every shape ----------------------------------------------------------------------------------------------------


@DTYPE
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_is_exact_for_any_rows_strides_and_addresses(dtype: torch.dtype, n: int, k: int) -> None:
    for m in M:
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        expected = reference.linear(x, weight, scale, bias)
        without_bias = reference.linear(x, weight, scale)
        on_chip = packed_on_device(weight, scale)
        x, bias = on_device(x, bias)
        assert_same(mxfp8_ops.linear_packed(x, on_chip, n, bias).cpu(), expected)
        assert_same(mxfp8_ops.linear_packed(x, on_chip, n).cpu(), without_bias)
        strided = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        assert_same(mxfp8_ops.linear_packed(strided, on_chip, n, bias).cpu(), expected)
        shifted = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(m, k)
        assert m == 0 or shifted.data_ptr() % 16 == x.element_size()
        assert_same(mxfp8_ops.linear_packed(shifted, on_chip, n, bias).cpu(), expected)


@DTYPE
def test_any_leading_dimensions(dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(24, 33, 288, dtype)
    expected = reference.linear(x, weight, scale, bias)
    on_chip, x, bias = packed_on_device(weight, scale), *on_device(x, bias)
    for shape in ((24,), (2, 12), (2, 1, 3, 4)):
        actual = mxfp8_ops.linear_packed(x.view(*shape, 288), on_chip, 33, bias)
        assert_same(actual.cpu(), expected.view(*shape, 33))
    turned = x.view(4, 6, 288).transpose(0, 1)
    assert_same(mxfp8_ops.linear_packed(turned, on_chip, 33, bias).cpu(), expected.view(4, 6, 33).transpose(0, 1))
    assert_same(mxfp8_ops.linear_packed(x[5], on_chip, 33, bias).cpu(), expected[5])
    assert mxfp8_ops.linear_packed(x[:0].view(0, 3, 288), on_chip, 33, bias).shape == (0, 3, 33)


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_bias_and_weight_may_lie_anywhere(dtype: torch.dtype, m: int) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 288, 288, dtype)
    expected = reference.linear(x, weight, scale, bias)
    on_chip, x, bias = packed_on_device(weight, scale), *on_device(x, bias)
    strided = torch.stack([bias, bias + 1], -1)[:, 0]
    shifted = torch.cat([bias[:1], bias])[1:]
    moved = torch.cat([on_chip.new_zeros(1), on_chip.flatten()])[1:].view_as(on_chip)
    for each in (strided, shifted):
        assert_same(mxfp8_ops.linear_packed(x, on_chip, 288, each).cpu(), expected)
    assert_same(mxfp8_ops.linear_packed(x, moved, 288, bias).cpu(), expected)
    assert_same(mxfp8_ops.linear_packed(x, on_chip, 288, bias[:1].expand(288)).cpu()[:, 0], expected[:, 0])


def test_float32_and_the_switch_do_without_the_kernels(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for m in EACH_KERNEL:
        for dtype in DTYPES:
            x, weight, scale, bias = exact_linear_inputs(m, 300, 1056, dtype)
            on_chip, (x, bias) = packed_on_device(weight, scale), on_device(x, bias)
            with monkeypatch.context() as patch:
                expected = mxfp8_ops.linear_packed(x, on_chip, 300, bias)
                used = len(calls)
                patch.setenv("MXFP8_KERNELS", "off")
                assert ops.kernel_name("linear", x.device) == "reference"
                assert_same(mxfp8_ops.linear_packed(x, on_chip, 300, bias), expected)
                assert len(calls) == used
    if torch.cuda.get_device_capability() == (9, 0):
        assert calls == [m for m in EACH_KERNEL for _ in DTYPES[:2]]
    else:
        assert calls == []


@HOPPER
def test_the_kernels_for_hopper_are_those_that_ran() -> None:
    """Otherwise nothing in this file has tested them."""
    assert dispatch._hopper_kernels(torch.device("cuda", torch.cuda.current_device())) is packed


# --- every plan -----------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def run_guarded(plan: plans.Plan, x: Tensor, on_chip: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Checks that nothing is written next to the result, and that all of it is."""
    m = len(x)
    memory = torch.full((m * n + 4096,), torch.nan, dtype=x.dtype, device="cuda")
    memory[:2048], memory[-2048:] = 7, 7
    out = memory[2048:-2048].view(m, n)
    packed._run(plan, x, on_chip, bias, out)
    assert (memory[:2048] == 7).all()
    assert (memory[-2048:] == 7).all()
    return out


def problem(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``x`` before rows of NaN, the packed weight, bias, and what is expected; on the device."""
    x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
    expected = reference.linear(x, weight, scale, bias)
    longer = torch.cat([x, torch.full_like(x[:1], torch.nan).expand(8, -1)]).cuda()
    return longer[:m], packed_on_device(weight, scale), bias.cuda(), expected.cuda()


def all_plans(m: int, n: int, k: int) -> list[plans.Plan]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return list(dict.fromkeys([plans.plan(m, n, k, processors), *plans.candidates(m, n, k, processors)]))


@HOPPER
@pytest.mark.parametrize("m", [1, 8, 9, 16, 27, 32, 50, 64, 100, 128, 129, 300])
@pytest.mark.parametrize(("n", "k"), [(33, 96), (1000, 4128)])
@pytest.mark.usefixtures("poisoned")
def test_every_plan_gives_the_same_right_bits_again_and_again(m: int, n: int, k: int) -> None:
    x, on_chip, bias, expected = problem(m, n, k, torch.bfloat16)
    for plan in all_plans(m, n, k):
        for _ in range(20):
            assert_same(run_guarded(plan, x, on_chip, bias, n), expected)


@HOPPER
@SHORT
@pytest.mark.parametrize(("m", "n", "k"), [(1100, 4097, 1056), (4200, 1024, 288), (300, 4096, 4096)])
@pytest.mark.usefixtures("poisoned")
def test_plans_that_split_some_tiles_or_all_are_right(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, on_chip, bias, expected = problem(m, n, k, dtype)
    found = all_plans(m, n, k)
    assert any(plan.parts > 1 for plan in found)
    for plan in found:
        for _ in range(3):
            assert_same(run_guarded(plan, x, on_chip, bias, n), expected)


@HOPPER
@SHORT
@pytest.mark.parametrize("m", [5, 16, 40, 64, 128, 256])
@pytest.mark.usefixtures("poisoned")
def test_every_plan_decodes_special_codes(m: int, dtype: torch.dtype) -> None:
    weight, scale = one_code_a_row((0, 1, 94, 127, 134, 135, 200, 254, 255), 1056)
    on_chip, x = packed_on_device(weight, scale), torch.ones(m, 1056, dtype=dtype, device="cuda")
    expected = what_codes_mean(weight, scale, dtype).cuda().expand(m, -1)
    for plan in all_plans(m, len(weight), 1056):
        assert_same(run_guarded(plan, x, on_chip, None, len(weight)), expected)


@SHORT
@pytest.mark.parametrize("m", [1, 8, 16, 64, 128, 256, 1024])
def test_two_runs_have_equal_bits_and_the_error_of_one_rounding(m: int, dtype: torch.dtype) -> None:
    weight, scale = mxfp8_ops.quantize(torch.randn(1000, 4096))
    x = torch.randn(m, 4096).to(dtype)
    exact = x.double() @ reference.dequant(weight, scale, torch.float32).double().T
    on_chip, x = packed_on_device(weight, scale), x.cuda()
    first, second = (mxfp8_ops.linear_packed(x, on_chip, 1000) for _ in range(2))
    assert_same(first, second)
    error = (first.cpu().double() - exact).norm() / exact.norm()
    assert error <= (1.7e-3 if dtype == torch.bfloat16 else 1.7e-3 / 8)


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
@pytest.mark.parametrize("k", [96, 1056, 4096])
def test_a_nan_contaminates_its_row_alone(m: int, k: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, k, dtype)
    for row, column in ((0, 0), (17, k - 1), (299, k // 2)):
        changed = weight.view(torch.uint8).clone()
        changed[row, column] = 0x7F
        expected = reference.linear(x, weight, scale, bias)
        expected[:, row] = torch.nan
        on_chip = packed_on_device(changed.view(weight.dtype), scale)
        assert_same(mxfp8_ops.linear_packed(x.cuda(), on_chip, 300, bias.cuda()).cpu(), expected)


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_infinities_of_x_stay_in_their_rows(m: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, 288, dtype)
    weight.view(torch.uint8)[weight == 0] = 0x38  # 1: infinity times zero would be NaN
    expected = reference.linear(x, weight, scale, bias)
    x[m - 1, 287] = torch.inf
    expected[m - 1] = (weight[:, 287].float().sign() * torch.inf).to(dtype)
    on_chip, x, bias = packed_on_device(weight, scale), *on_device(x, bias)
    actual = mxfp8_ops.linear_packed(x, on_chip, 300, bias).cpu()
    assert_same(actual[m - 1], expected[m - 1])
    assert actual[: m - 1].isfinite().all()


# --- weights that change, graphs, streams ---------------------------------------------------------------------------


def captured(x: Tensor, on_chip: Tensor, n: int, bias: Tensor | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    mxfp8_ops.linear_packed(x, on_chip, n, bias)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mxfp8_ops.linear_packed(x, on_chip, n, bias)
    return graph, out


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_a_captured_graph_sees_x_and_weight_as_they_are(m: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, 1056, dtype)
    on_chip, place, offset = packed_on_device(weight, scale), *on_device(x, bias)
    graph, out = captured(place, on_chip, 300, offset)
    for seed in range(3):
        other = weight.view(torch.uint8).roll(seed, 0).view(weight.dtype)
        on_chip.copy_(mxfp8_ops.pack(other, scale))
        place.copy_(x.roll(seed, 0))
        out.fill_(torch.nan)
        graph.replay()
        assert_same(out.cpu(), reference.linear(x.roll(seed, 0), other, scale, bias))


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_a_weight_that_becomes_special_in_place_is_decoded_exactly_at_once(m: int, dtype: torch.dtype) -> None:
    weight, scale = one_code_a_row(range(100, 130), 160, nan=False)
    special, large = one_code_a_row(range(226, 256), 160, nan=False)
    special.view(torch.uint8)[-1, 3] = 0x7F
    on_chip, x = packed_on_device(weight, scale), torch.ones(m, 160, dtype=dtype, device="cuda")
    graph, out = captured(x, on_chip, len(weight), None)
    for codes in ((special, large), (weight, scale), (special, large)):
        expected = what_codes_mean(*codes, dtype).expand(m, -1)
        on_chip.copy_(mxfp8_ops.pack(*codes))
        assert_same(mxfp8_ops.linear_packed(x, on_chip, len(weight)).cpu(), expected)
        graph.replay()
        assert_same(out.cpu(), expected)


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_two_streams_at_once_do_not_disturb_each_other(m: int, dtype: torch.dtype) -> None:
    problems = [exact_linear_inputs(m, n, 4096, dtype) for n in (1000, 1001)]
    expected = [reference.linear(*each).cuda() for each in problems]
    inputs = [(x.cuda(), packed_on_device(w, s), len(w), b.cuda()) for x, w, s, b in problems]
    for each in inputs:
        mxfp8_ops.linear_packed(*each)  # compiles
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, each, found in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(mxfp8_ops.linear_packed(*each))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        for each in found:
            assert_same(each, right)


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


def test_linear_takes_no_memory_but_the_result_and_sums_of_parts() -> None:
    weight = torch.full((8192, 8192), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    on_chip = packed_on_device(weight, torch.full((8192, 256), 127, dtype=torch.uint8))
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("without kernels for packed weights they are dequantized")
    for m in EACH_KERNEL:
        x = torch.ones(m, 8192, dtype=torch.bfloat16, device="cuda")
        mxfp8_ops.linear_packed(x, on_chip, 8192)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mxfp8_ops.linear_packed(x, on_chip, 8192)
        assert torch.cuda.max_memory_allocated() - before <= m * 8192 * (2 + 4 * 5) + 2**20  # five parts at most
