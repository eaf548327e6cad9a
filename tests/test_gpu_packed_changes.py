"""Weights that change, graphs and streams on a CUDA device: no answer is stale or of another's memory."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import reference

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import one_code_a_row, what_codes_mean
from on_chip import EACH_KERNEL, FORM, HOPPER, SHORT, OnChip, linear, on_device, packed_on_device, put

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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
