"""The operators on the CPU: which way a linear goes, by rows of x and dtype, and that each way gives the same."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_calls import DTYPES, LEVELS
from helpers import all_codes, assert_same, exact_linear_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mxfp8_ops
from mxfp8_ops import cpu, ops, reference
from mxfp8_ops.cpu import dispatch

CPU = torch.device("cpu")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MXFP8_CPU_LEVEL", request.param)
    return request.param


@pytest.fixture(params=["as the machine is", "float32", "x's dtype"])
def multiplied_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch multiplies panels in."""
    if request.param != "as the machine is":
        native = request.param == "x's dtype"
        monkeypatch.setattr(dispatch, "_multiplies", lambda dtype: native or dtype == torch.float32)


def test_kernel_name_says_the_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear", "dequant", "quantize"):
        assert ops.kernel_name(name, CPU) == f"cpu, {level}"
    monkeypatch.setenv("MXFP8_KERNELS", "off")
    for name in ("linear", "dequant", "quantize"):
        assert ops.kernel_name(name, CPU) == "reference"


def calls_of_all(x: Tensor, weight: Tensor, scale: Tensor) -> Iterator[Any]:
    yield mxfp8_ops.linear(x, weight, scale)
    yield mxfp8_ops.dequant(weight, scale)
    yield mxfp8_ops.quantize(x)


@pytest.mark.parametrize("without", ["kernels off", "no kernels"])
def test_the_reference_computes_where_kernels_do_not(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if without == "kernels off":
        monkeypatch.setenv("MXFP8_KERNELS", "off")
    else:
        monkeypatch.setattr(cpu, "kernels", lambda: None)
        assert ops.kernel_name("linear", CPU) == "reference"
    monkeypatch.setattr(dispatch, "_kernels", lambda: pytest.fail("a kernel is called"))
    x, weight, scale, _ = exact_linear_inputs(3, 7, 96, torch.bfloat16)
    linear, dequant, quantized = calls_of_all(x, weight, scale)
    assert_same(linear, reference.linear(x, weight, scale))
    assert_same(dequant, reference.dequant(weight, scale))
    for actual, expected in zip(quantized, reference.quantize(x), strict=True):
        assert_same(actual, expected)


def test_kernels_compute_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear", "dequant", "quantize"):
        monkeypatch.setattr(reference, name, lambda *args: pytest.fail("the reference is called"))
    x, weight, scale, _ = exact_linear_inputs(3, 7, 96, torch.bfloat16)
    assert len(list(calls_of_all(x, weight, scale))) == 3
    assert len(list(calls_of_all(x.requires_grad_(), weight, scale))) == 3  # and below autograd


@pytest.mark.parametrize(
    ("told", "mebibytes"), [("8192K\n", 2), ("16384K\n", 4), ("307200K\n", 8), ("lots\n", 2), (None, 2)]
)
def test_panels_take_a_quarter_of_the_last_cache(
    told: str | None, mebibytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is not None:
        (tmp_path / "size").write_text(told)
    monkeypatch.setattr(dispatch, "_LAST_CACHE", tmp_path / "size")
    dispatch._panel_bytes.cache_clear()
    for dtype in DTYPES:
        assert dispatch._panel_rows(dtype, 4096) * 4096 * dtype.itemsize == mebibytes << 20
    assert dispatch._panel_rows(torch.float32, 1 << 20) == 32, "at least"
    dispatch._panel_bytes.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel_rows", [1, 5, 32, 1000])
@pytest.mark.usefixtures("multiplied_in")
def test_panels_give_the_bits_of_the_reference(
    level: str, dtype: torch.dtype, panel_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_most_rows", lambda dtype: 0)
    monkeypatch.setattr(dispatch, "_panel_rows", lambda dtype, k: panel_rows)
    for m, n, k in ((1, 7, 32), (3, 67, 96), (40, 33, 288)):
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        assert_same(mxfp8_ops.linear(x, weight, scale, bias), reference.linear(x, weight, scale, bias))
        assert_same(mxfp8_ops.linear(x, weight, scale), reference.linear(x, weight, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("multiplied_in")
def test_panels_round_every_code_as_dequant_does(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_most_rows", lambda dtype: 0)
    weight, scale = all_codes()
    values = reference.dequant(weight, scale, dtype)
    finite = values.isfinite().all(1)
    normal = values.float().abs().where(values != 0, 1).ge(2.0**-126).all(1)  # torch may flush others
    out = mxfp8_ops.linear(torch.eye(256, dtype=dtype), weight, scale)
    assert_same(out.t()[finite & normal] + 0.0, values[finite & normal] + 0.0)
    assert out.t()[values.isnan().any(1)].isnan().all()


def test_rows_of_x_decide_which_way_a_linear_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []
    monkeypatch.setattr(dispatch, "_by_panels", lambda *args: ways.append(len(args[0])))
    for dtype in DTYPES:
        ways.clear()
        most = dispatch._most_rows(dtype)
        if most == sys.maxsize:  # by matrix tiles, however many there are
            continue
        for m in (1, most, most + 1):
            x, weight, scale, _ = exact_linear_inputs(m, 7, 64, dtype)
            mxfp8_ops.linear(x, weight, scale)
        assert ways == [most + 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_both_ways(level: str, dtype: torch.dtype) -> None:
    for m in (1, 3, 70):
        x, weight, scale, bias = exact_linear_inputs(m, 7, 96, dtype)
        expected = reference.linear(x, weight, scale, bias)
        xs = x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :96], x.repeat_interleave(2, 0)[::2]
        weights = weight, weight.view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)
        scales = scale, torch.cat([scale, scale], 1)[:, :3]
        biases = bias, bias.repeat_interleave(2)[::2]
        for arguments in itertools.product(xs, weights, scales, biases):
            out = mxfp8_ops.linear(*arguments)
            assert out.is_contiguous()
            assert_same(out, expected)
        assert_same(mxfp8_ops.linear(x.view(1, m, 1, 96), weight, scale, bias), expected.view(1, m, 1, 7))
    assert_same(mxfp8_ops.linear(x[0], weight, scale, bias), expected[0])
    assert mxfp8_ops.linear(x[:0].view(2, 0, 96), weight, scale).shape == (2, 0, 7)


def test_panels_of_several_threads_of_python_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_panel_rows", lambda dtype, k: 8)
    inputs = [exact_linear_inputs(m, 67, k, dtype) for m in (70, 90) for k in (64, 288) for dtype in DTYPES]
    expected = [reference.linear(*each) for each in inputs]

    def work(turn: int) -> None:
        for i in range(3 * len(inputs)):
            i = (i + 5 * turn) % len(inputs)
            assert_same(mxfp8_ops.linear(*inputs[i]), expected[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_dequantized_copy_of_the_weight_is_made(dtype: torch.dtype) -> None:
    weight, scale = mxfp8_ops.quantize(torch.randn(8192, 2048))  # twice the largest panel
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    for m in (1, 16, 100):
        x = torch.randn(m, 2048).to(dtype)
        kernels = cpu.kernels()
        assert kernels is not None
        with Sizes():
            kernels.linear(x, weight, scale, None)
    assert 0 < largest <= weight.numel()


def test_forward_and_backward_agree_with_the_reference() -> None:
    for m in (3, 70):
        x, weight, scale, bias = exact_linear_inputs(m, 7, 96, torch.float32)
        gradients = []
        for linear in (mxfp8_ops.linear, reference.linear):
            leaf, offset = x.clone().requires_grad_(), bias.clone().requires_grad_()
            linear(leaf, weight, scale, offset).square().sum().backward()
            gradients.append((leaf.grad, offset.grad))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
