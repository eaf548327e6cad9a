"""Every plan of the kernels for Hopper on a CUDA device: the bits of the reference, again and again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import reference

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import one_code_a_row, what_codes_mean
from on_chip import (
    EACH_KERNEL,
    FORM,
    HOPPER,
    SHORT,
    OnChip,
    guarded,
    linear,
    on_device,
    problem,
    processors,
    put,
    source_of,
)
from planning import split_of, tiles_of

from mxfp8_ops.gpu import hopper, plans, plans_few

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def run_guarded(plan: plans.Plan, x: Tensor, on_chip: OnChip, bias: Tensor | None, n: int) -> Tensor:
    """Checks that nothing is written next to the result, and that all of it is."""
    return guarded(len(x), n, x.dtype, lambda out: hopper._run(plan, x, source_of(on_chip), bias, out))


def all_plans(m: int, n: int, k: int, packed: bool) -> list[plans.Plan]:
    choices = plans.candidates(m, n, k, processors(), packed)
    return list(dict.fromkeys([plans.plan(m, n, k, processors(), packed), *choices]))


@HOPPER
@FORM
@pytest.mark.parametrize(("n", "k"), [(33, 96), (1000, 4128), (1000, 4224), (1000, 6432)])
@pytest.mark.parametrize("m", [1, 8, 16, 27, 50, 70, 100, 128, 150, 300])
@pytest.mark.usefixtures("poisoned")
def test_every_plan_gives_the_same_right_bits_again_and_again(m: int, n: int, k: int, packed: bool) -> None:
    k = k if packed else max(128, k // 128 * 128)
    x, on_chip, bias, expected = problem(m, n, k, torch.bfloat16, packed)
    for plan in all_plans(m, n, k, packed):
        for _ in range(5):
            assert_same(run_guarded(plan, x, on_chip, bias, n), expected)


@HOPPER
@FORM
@SHORT
@pytest.mark.parametrize(
    "m", [9, 15, 17, 31, 33, 47, 49, 63, 65, 79, 81, 95, 97, 127, 129, 159, 161, 191, 193, 255, 257, 319, 321, 385]
)
@pytest.mark.usefixtures("poisoned")
def test_rows_about_the_ends_of_tiles_and_boxes_are_right(m: int, dtype: torch.dtype, packed: bool) -> None:
    for n, k in ((7, 128), (289, 1024), (4097, 384)):
        x, on_chip, bias, expected = problem(m, n, k, dtype, packed)
        plan = plans.plan(m, n, k, processors(), packed)
        assert_same(run_guarded(plan, x, on_chip, bias, n), expected)
        assert_same(linear(x, on_chip, n, bias), expected)


@HOPPER
@SHORT
@pytest.mark.parametrize("kernel", plans_few.NARROW, ids=repr)
@pytest.mark.usefixtures("poisoned")
def test_boxes_of_the_same_rows_are_right(kernel: plans_few.Narrow, dtype: torch.dtype) -> None:
    """Of the second half of a tile, of which x has some rows or all."""
    for m in range(kernel.rows // 2 + 1, kernel.rows + 1):
        x, on_chip, bias, expected = problem(m, 289, 1152, dtype, True)
        assert_same(run_guarded(kernel, x, on_chip, bias, 289), expected)


@HOPPER
@FORM
@SHORT
@pytest.mark.parametrize(("m", "n", "k"), [(1100, 4097, 1056), (2100, 1000, 2208), (300, 4097, 4128)])
@pytest.mark.usefixtures("poisoned")
def test_plans_that_split_some_tiles_or_all_are_right(m: int, n: int, k: int, dtype: torch.dtype, packed: bool) -> None:
    k = k if packed else k // 128 * 128
    x, on_chip, bias, expected = problem(m, n, k, dtype, packed)
    found = all_plans(m, n, k, packed)
    assert any(split_of(plan, m, n) for plan in found)
    for plan in found:
        for _ in range(2):
            assert_same(run_guarded(plan, x, on_chip, bias, n), expected)


@HOPPER
@FORM
@SHORT
@pytest.mark.parametrize("programs", [1, 2, 7, 50])
@pytest.mark.parametrize("rows", plans.WIDE)
@pytest.mark.usefixtures("poisoned")
def test_programs_that_share_tiles_are_right_however_many_there_are(
    rows: int, programs: int, dtype: torch.dtype, packed: bool
) -> None:
    """Shares of less than a tile and of more, of a fast weight and of one that needs exact decoding."""
    for m, n, k in ((700, 1000, 1024), (257, 2100, 4096)):
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        for special in (False, True):
            if special:
                scale[5] = 255
            expected = reference.linear(x, weight, scale, bias).cuda()
            on_chip = put(weight, scale, packed, dtype)
            tiles = tiles_of(plans.Wide(programs, 0, rows), m, n)
            shares = [0, tiles if tiles < programs else programs + tiles % programs, min(tiles, 2 * programs - 1)]
            for shared in dict.fromkeys(shares):
                if shared == 0 or shared * k / 128 >= plans.SHARE * programs:
                    for _ in range(3):
                        plan = plans.Wide(programs, shared, rows)
                        assert_same(run_guarded(plan, x.cuda(), on_chip, bias.cuda(), n), expected)


@HOPPER
@FORM
def test_programs_that_share_tiles_find_nothing_of_another_launch(packed: bool) -> None:
    """Neither of one before, in the same memory, nor of one that runs at the same time."""
    n, k, launched = 4096, 2048, []
    for m in (1100, 1400):
        x, on_chip, bias, expected = problem(m, n, k, torch.bfloat16, packed)
        found = plans.candidates(m, n, k, processors(), packed)
        plan = next(each for each in found if getattr(each, "shared", 0))
        out, stream, graph = torch.empty_like(expected), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        hopper._run(plan, x, source_of(on_chip), bias, out)
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(3):
                hopper._run(plan, x, source_of(on_chip), bias, out)
        negative = (2 * bias.double() - expected.double()).to(out.dtype)
        launched.append((x, out, stream, graph, (negative, expected), on_chip, bias))  # all that graphs need
    for turn in range(20):
        for x, out, *_ in launched:
            x.neg_()
            out.fill_(torch.nan)
        torch.cuda.synchronize()
        for _, _, stream, graph, *_ in launched:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for _, out, _, _, expected, *_ in launched:
            assert_same(out, expected[turn % 2])


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
