"""Calls in a graph that write to a tensor, in every way that torch has: nobody reads it as it was before, and what
graphs share is not theirs to write to.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from models import folding, layer, rows
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import mxfp8_ops
from lowering.recognising import recognise_all


@torch.library.custom_op("mxfp8_test::double_", mutates_args={"tensor"})
def double_(tensor: Tensor, times: int) -> None:
    tensor.mul_(2**times)


def within_a_checkpoint(tensor: Tensor) -> None:
    def write(x: Tensor) -> Tensor:
        tensor.mul_(2)
        return x + 1

    checkpoint(write, torch.ones(1), use_reentrant=False)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "method": lambda w: w.mul_(2),
    "method of a view": lambda w: w.view(-1)[:100].mul_(2),
    "item": lambda w: w.__setitem__(slice(4), 0),
    "argument": lambda w: F.silu(w, inplace=True),
    "positional argument": lambda w: F.relu(w, True),
    "argument among others": lambda w: F.dropout(w, 1.0, True, inplace=True),
    "module": lambda w: nn.ReLU(inplace=True)(w),
    "list": lambda w: torch._foreach_mul_([w], 2.0),
    "out": lambda w: torch.mul(w, 2.0, out=w),
    "outs": lambda w: torch.aminmax(torch.ones_like(w), dim=0, out=(w[0], w[1])),
    "operator": lambda w: double_(w, 1),
    "operator by keywords": lambda w: double_(times=1, tensor=w),
    "overload by keywords": lambda w: torch.ops.mxfp8_test.double_.default(times=1, tensor=w),
    "packet": lambda w: torch.ops.mxfp8_test.double_(w, 1),
    "embedding": lambda w: F.embedding(torch.arange(4), w, max_norm=1.0),
    "sub-graph": within_a_checkpoint,
}
WRITE = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
FLAG = pytest.mark.parametrize("flag", [False, True], ids=["off", "on"])


@WRITE
@FLAG
@pytest.mark.parametrize("product", [F.linear, lambda x, w: x @ w.t()], ids=["linear", "matmul"])
def test_dequantized_tensor_is_read_as_it_was_written(
    write: Callable[[Tensor], object], flag: bool, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """In every call, and the same weight elsewhere as it is."""
    packed, x = layer(64, 64, bias=False), rows()

    def function(x: Tensor) -> Tensor:
        weight = mxfp8_ops.dequant(packed.weight, packed.weight_scale)
        write(weight)
        return product(x, weight)

    with torch.no_grad():
        expected = function(x)
        compiled = torch.compile(function, backend=folding(dequant_at_load=flag))
        for _ in range(2):
            assert_same(compiled(x), expected)
        assert_same(torch.compile(packed, backend=folding(dequant_at_load=flag))(x), packed(x))


def test_linear_on_a_dequantized_tensor_that_is_written_to_later_is_recognised() -> None:
    packed = layer(64, 64)
    counts = []

    def compile_graph(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        counts.append(recognise_all(gm))
        return gm.forward

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        weight = mxfp8_ops.dequant(packed.weight, packed.weight_scale)
        result = F.linear(x, weight)
        weight.mul_(2)
        return result, F.linear(x, weight)

    with torch.no_grad():
        for ours, theirs in zip(torch.compile(function, backend=compile_graph)(rows()), function(rows()), strict=True):
            assert_same(ours, theirs)
    assert counts == [1]


SCALES: dict[str, Callable[[Tensor], object]] = {
    "method": lambda s: s.add_(1),
    "list": lambda s: torch._foreach_add_([s], 1),
    "operator by keywords": lambda s: double_(times=1, tensor=s),
    "sub-graph": within_a_checkpoint,
}


@pytest.mark.parametrize("write", SCALES.values(), ids=SCALES)
@FLAG
def test_scale_that_is_written_to_between_two_calls_of_a_layer_counts(
    write: Callable[[Tensor], object], flag: bool
) -> None:
    def function(packed: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        first = packed(x)
        write(packed.weight_scale)
        return first, packed(x)

    ours, theirs = (layer(64, 64) for _ in range(2))
    with torch.no_grad():
        for each in (ours, theirs):
            each.weight_scale.fill_(60)  # twice it is no overflow
        compiled = torch.compile(function, backend=folding(dequant_at_load=flag))
        for one, other in zip(compiled(ours, rows()), function(theirs, rows()), strict=True):
            assert_same(one, other)
