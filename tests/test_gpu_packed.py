"""Linear on packed and on canonical weights on a CUDA device: the bits of the reference, from every kernel and every
plan.

Kernels take seconds to compile, and each anew for N that are multiples of 16, for a bias, and for each dtype. So most
tests have a bias and an N that is no such multiple, or neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest
import torch
from helpers import (
    all_codes,
    assert_same,
    exact_linear_inputs,
    expected_from_float64,
    float64_values,
    round_once,
)
from torch import Tensor, nn

import mxfp8_ops
from mxfp8_ops import Mxfp8Linear, ops, packing, reference

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import one_code_a_row, what_codes_mean

from mxfp8_ops.gpu import dispatch, hopper, plans, replay

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
FORM = pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
EACH_FORM = pytest.mark.parametrize(
    "packed_for", [*packing.PACKED_FOR, None], ids=["for bfloat16", "for float16", "canonical"]
)
EACH_KERNEL = (1, 3, 8, 16, 64, 128, 256)
"""Rows of x that between them meet all kernels."""
M = (0, 1, 2, 5, 8, 9, 17, 33, 64, 65, 129, 200, 257, 300, 513)
SHAPES = [
    *((True, n, k) for n, k in ((1, 32), (7, 96), (33, 288), (257, 1056), (300, 4128), (4097, 128), (1024, 4096))),
    *((False, n, k) for n, k in ((1, 128), (7, 96), (7, 384), (288, 1024), (300, 4128), (4097, 128), (1024, 4096))),
]
"""Packed or not, N, K. Where K is no multiple of 128, canonical weights are left to other kernels."""

OnChip: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""A weight on the device, packed or canonical."""


def on_device(*tensors: Tensor) -> Iterator[Tensor]:
    return (tensor.cuda() for tensor in tensors)


def packed_on_device(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """For x of ``dtype``; that of float32, for which a weight cannot be packed, makes do with any other."""
    return mxfp8_ops.pack(*on_device(weight, scale), dtype if dtype in packing.PACKED_FOR else torch.float16)


def put(weight: Tensor, scale: Tensor, packed: bool, dtype: torch.dtype) -> OnChip:
    return packed_on_device(weight, scale, dtype) if packed else (weight.cuda(), scale.cuda())


def linear(x: Tensor, on_chip: OnChip, n: int, bias: Tensor | None = None) -> Tensor:
    """The operator for a weight of either form."""
    if isinstance(on_chip, Tensor):
        return mxfp8_ops.linear_packed(x, on_chip, n, bias)
    return mxfp8_ops.linear(x, *on_chip, bias)


def in_sixteens(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """With rows of zeros after the others, so that their number is a multiple of 16."""
    more = -len(weight) % 16
    zeros = torch.zeros(more, weight.shape[1], dtype=torch.uint8)
    ones = torch.full((more, scale.shape[1]), 127, dtype=torch.uint8)
    return torch.cat([weight.view(torch.uint8), zeros]).view(weight.dtype), torch.cat([scale, ones])


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
    for m, k, used in ((16, 384, True), (3072, 128, True), (3073, 128, False), (16, 96, False), (200, 4128, False)):
        x, weight, scale, bias = exact_linear_inputs(m, 300, k, torch.bfloat16)
        calls.clear()
        actual = linear(x.cuda(), put(weight, scale, False, torch.bfloat16), 300, bias.cuda())
        assert_same(actual.cpu(), reference.linear(x, weight, scale, bias))
        assert calls == ([m] if used else [])


@HOPPER
def test_the_kernels_for_hopper_are_those_that_ran() -> None:
    """Otherwise nothing in this file has tested them."""
    assert dispatch._hopper_kernels(torch.device("cuda", torch.cuda.current_device())) is hopper


# --- every plan -----------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def run_guarded(plan: plans.Plan, x: Tensor, on_chip: OnChip, bias: Tensor | None, n: int) -> Tensor:
    """Checks that nothing is written next to the result, and that all of it is."""
    m = len(x)
    memory = torch.full((m * n + 4096,), torch.nan, dtype=x.dtype, device="cuda")
    memory[:2048], memory[-2048:] = 7, 7
    out = memory[2048:-2048].view(m, n)
    hopper._run(plan, x, source_of(on_chip), bias, out)
    assert (memory[:2048] == 7).all()
    assert (memory[-2048:] == 7).all()
    return out


def source_of(on_chip: OnChip) -> Tensor | hopper.Canonical:
    """As the kernels take it."""
    if isinstance(on_chip, Tensor):
        return on_chip
    return hopper.Canonical(*(each.view(torch.int32) for each in on_chip))


def problem(m: int, n: int, k: int, dtype: torch.dtype, packed: bool) -> tuple[Tensor, OnChip, Tensor, Tensor]:
    """``x`` before rows of NaN in memory, the weight, bias, and what is expected; on the device."""
    x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
    exact = x.double() @ float64_values(weight, scale).T + bias.double()
    longer = torch.cat([x, torch.full((256, k), torch.nan, dtype=dtype)]).cuda()
    return longer[:m], put(weight, scale, packed, dtype), bias.cuda(), round_once(exact, dtype).cuda()


def processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def all_plans(m: int, n: int, k: int, packed: bool) -> list[plans.Plan]:
    choices = plans.candidates(m, n, k, processors(), packed)
    return list(dict.fromkeys([plans.plan(m, n, k, processors(), packed), *choices]))


@HOPPER
@FORM
@pytest.mark.parametrize("m", [1, 8, 16, 27, 50, 100, 128, 300])
@pytest.mark.usefixtures("poisoned")
def test_every_plan_gives_the_same_right_bits_again_and_again(m: int, packed: bool) -> None:
    for n, k in ((33, 96), (1000, 4128), (1000, 4224)) if packed else ((33, 128), (1000, 4096)):
        x, on_chip, bias, expected = problem(m, n, k, torch.bfloat16, packed)
        for plan in all_plans(m, n, k, packed):
            for _ in range(5):
                assert_same(run_guarded(plan, x, on_chip, bias, n), expected)


@HOPPER
@FORM
@SHORT
@pytest.mark.parametrize("m", [9, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257, 385])
@pytest.mark.usefixtures("poisoned")
def test_rows_about_the_ends_of_tiles_and_boxes_are_right(m: int, dtype: torch.dtype, packed: bool) -> None:
    for n, k in ((7, 128), (289, 1024), (4097, 384)):
        x, on_chip, bias, expected = problem(m, n, k, dtype, packed)
        plan = plans.plan(m, n, k, processors(), packed)
        assert_same(run_guarded(plan, x, on_chip, bias, n), expected)
        assert_same(linear(x, on_chip, n, bias), expected)


@HOPPER
@FORM
@SHORT
@pytest.mark.parametrize(("m", "n", "k"), [(1100, 4097, 1056), (2100, 1000, 288), (300, 4097, 4128)])
@pytest.mark.usefixtures("poisoned")
def test_plans_that_split_some_tiles_or_all_are_right(m: int, n: int, k: int, dtype: torch.dtype, packed: bool) -> None:
    k = k if packed else k // 128 * 128
    x, on_chip, bias, expected = problem(m, n, k, dtype, packed)
    found = all_plans(m, n, k, packed)
    assert any(plan.parts > 1 for plan in found)
    for plan in found:
        for _ in range(2):
            assert_same(run_guarded(plan, x, on_chip, bias, n), expected)


@HOPPER
@FORM
@SHORT
@pytest.mark.parametrize("m", [5, 16, 27, 50, 100, 256])
@pytest.mark.usefixtures("poisoned")
def test_every_plan_decodes_special_codes(m: int, dtype: torch.dtype, packed: bool) -> None:
    weight, scale = one_code_a_row((0, 1, 94, 127, 134, 135, 200, 254, 255), 1024)
    weight, scale = weight[:-1], scale[:-1]
    n, x = len(weight), torch.ones(m, 1024, dtype=dtype, device="cuda")
    on_chip, bias = put(weight, scale, packed, dtype), torch.zeros(n, dtype=dtype, device="cuda")
    expected = what_codes_mean(weight, scale, dtype).cuda().expand(m, -1)
    for plan in all_plans(m, n, 1024, packed):
        assert_same(run_guarded(plan, x, on_chip, bias, n), expected)


@FORM
@SHORT
@pytest.mark.parametrize("m", [1, 8, 16, 64, 128, 256, 1024])
def test_two_runs_have_equal_bits_and_the_error_of_one_rounding(m: int, dtype: torch.dtype, packed: bool) -> None:
    weight, scale = mxfp8_ops.quantize(torch.randn(1024, 4096))
    x = torch.randn(m, 4096).to(dtype)
    exact = x.double() @ reference.dequant(weight, scale, torch.float32).double().T
    on_chip, x = put(weight, scale, packed, dtype), x.cuda()
    first, second = (linear(x, on_chip, 1024) for _ in range(2))
    assert_same(first, second)
    error = (first.cpu().double() - exact).norm() / exact.norm()
    assert error <= (1.7e-3 if dtype == torch.bfloat16 else 1.7e-3 / 8)


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
@pytest.mark.parametrize(("packed", "k"), [(True, 96), (True, 1056), (False, 128), (False, 1024)])
def test_a_nan_contaminates_its_row_alone(m: int, packed: bool, k: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, k, dtype)
    for row, column in ((0, 0), (17, k - 1), (299, k // 2)):
        changed = weight.view(torch.uint8).clone()
        changed[row, column] = 0x7F
        expected = reference.linear(x, weight, scale, bias)
        expected[:, row] = torch.nan
        on_chip = put(changed.view(weight.dtype), scale, packed, dtype)
        assert_same(linear(x.cuda(), on_chip, 300, bias.cuda()).cpu(), expected)


@FORM
@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_infinities_of_x_stay_in_their_rows(m: int, dtype: torch.dtype, packed: bool) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, 384, dtype)
    weight.view(torch.uint8)[weight == 0] = 0x38  # 1: infinity times zero would be NaN
    expected = reference.linear(x, weight, scale, bias)
    x[m - 1, 383] = torch.inf
    expected[m - 1] = (weight[:, 383].float().sign() * torch.inf).to(dtype)
    on_chip, x, bias = put(weight, scale, packed, dtype), *on_device(x, bias)
    actual = linear(x, on_chip, 300, bias).cpu()
    assert_same(actual[m - 1], expected[m - 1])
    assert actual[: m - 1].isfinite().all()


# --- weights that change, graphs, streams ---------------------------------------------------------------------------


def captured(x: Tensor, on_chip: OnChip, n: int, bias: Tensor | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    linear(x, on_chip, n, bias)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, on_chip, n, bias)
    return graph, out


@FORM
@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_a_captured_graph_sees_x_and_weight_as_they_are(m: int, dtype: torch.dtype, packed: bool) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, 1024, dtype)
    on_chip, place, offset = put(weight, scale, packed, dtype), *on_device(x, bias)
    graph, out = captured(place, on_chip, 300, offset)
    for seed in range(3):
        other = weight.view(torch.uint8).roll(seed, 0).view(weight.dtype)
        if isinstance(on_chip, Tensor):
            on_chip.copy_(mxfp8_ops.pack(other, scale, dtype))
        else:
            on_chip[0].copy_(other)
        place.copy_(x.roll(seed, 0))
        out.fill_(torch.nan)
        graph.replay()
        assert_same(out.cpu(), reference.linear(x.roll(seed, 0), other, scale, bias))


@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_a_weight_that_becomes_special_in_place_is_decoded_exactly_at_once(m: int, dtype: torch.dtype) -> None:
    weight, scale = one_code_a_row(range(98, 130), 160, nan=False)
    special, large = one_code_a_row(range(224, 256), 160, nan=False)
    special.view(torch.uint8)[-1, 3] = 0x7F
    on_chip, x = packed_on_device(weight, scale, dtype), torch.ones(m, 160, dtype=dtype, device="cuda")
    graph, out = captured(x, on_chip, len(weight), None)
    for codes in ((special, large), (weight, scale), (special, large)):
        expected = what_codes_mean(*codes, dtype).expand(m, -1)
        on_chip.copy_(mxfp8_ops.pack(*codes, dtype))
        assert_same(mxfp8_ops.linear_packed(x, on_chip, len(weight)).cpu(), expected)
        graph.replay()
        assert_same(out.cpu(), expected)


@FORM
@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_two_streams_at_once_do_not_disturb_each_other(m: int, dtype: torch.dtype, packed: bool) -> None:
    problems = [exact_linear_inputs(m, n, 4096, dtype) for n in (1000, 1001)]
    expected = [reference.linear(*each).cuda() for each in problems]
    inputs = [(x.cuda(), put(w, s, packed, dtype), len(w), b.cuda()) for x, w, s, b in problems]
    for each in inputs:
        linear(*each)  # compiles
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, each, found in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(linear(*each))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        for each in found:
            assert_same(each, right)


@HOPPER
@SHORT
@pytest.mark.parametrize("m", EACH_KERNEL)
def test_kernels_that_may_start_early_read_what_was_written_before(
    m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of linears, each on the result of the one before, and weights that change right before they are read."""
    weights = [mxfp8_ops.quantize(torch.randn(1024, 1024, dtype=dtype, device="cuda") / 32) for _ in range(4)]
    packed = [mxfp8_ops.pack(*each) for each in weights]
    xs = [torch.randn(m, 1024, dtype=dtype, device="cuda") for _ in range(3)]
    changing = torch.empty_like(packed[0])

    def row(x: Tensor) -> Tensor:
        for each in packed * 2:
            x = mxfp8_ops.linear_packed(x, each, 1024)
            changing.copy_(each)
            x = mxfp8_ops.linear_packed(x, changing, 1024)
        return x

    expected = [row(x) for x in xs]
    monkeypatch.setenv("MXFP8_DEPENDENT_LAUNCH", "1")
    place = xs[0].clone()
    row(place)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = row(place)
    for _ in range(20):
        for x, right in zip(xs, expected, strict=True):
            assert_same(row(x), right)
            place.copy_(x)
            graph.replay()
            assert_same(out, right)


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
