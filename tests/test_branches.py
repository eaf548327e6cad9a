"""Weights inside ``torch.cond`` and ``while_loop``: the graphs that these call are left as they are, and said to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from models import entries_of, folding, layer, rows
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

import mxfp8_ops
from lowering import report
from lowering.report import GraphReport

LEFT = "inside {}, whose graphs are left as they are"


class Branches(nn.Module):
    """A linear in each branch, the first one outside, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = layer(64, 64), layer(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return torch.cond(x.sum() > 0, lambda x: self.one(x) + 1, lambda x: self.other(x).relu(), (x,))


class Loop(nn.Module):
    """The same linear again and again, and a dequant that is no part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = layer(64, 64), layer(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        def step(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.inner(x) @ mxfp8_ops.dequant(self.factor.weight, self.factor.weight_scale)

        return while_loop(lambda i, x: i < 3, step, (torch.tensor(0), x))[1]


def compiled(model: nn.Module, x: Tensor, **options: bool) -> tuple[Tensor, GraphReport]:
    torch._dynamo.reset()
    with report.collect() as graphs, torch.no_grad():
        found = torch.compile(model, backend=folding(**options), fullgraph=True)(x)
    (graph,) = graphs
    return found, graph


@pytest.mark.parametrize("flag", [False, True])
def test_weights_of_branches_are_kept_and_one_that_is_used_outside_is_folded_there(flag: bool) -> None:
    model = Branches()
    for x in (rows(4, 64), -rows(4, 64)):
        found, graph = compiled(model, x, dequant_at_load=flag)
        assert_same(found, model(x))
        one, other = sorted(graph.weights, key=lambda row: row.name)
        assert (other.name, other.action) == ("other.weight", "kept")
        assert other.kernel.startswith("mxfp8.linear (cpu")
        assert other.reason == (LEFT.format("cond") if flag else "the flag is not on")
        assert (one.name, one.action) == ("one.weight", "folded" if flag else "kept")
    assert len(entries_of(model)) == flag


def test_what_branches_read_is_not_released() -> None:
    model, x = Branches(), rows(4, 64)
    expected = model(x)
    found, _ = compiled(model, x, dequant_at_load=True, release_quantized=True)
    assert_same(found, expected)
    assert_same(model(x), expected)


@pytest.mark.parametrize("flag", [False, True])
def test_weights_of_a_loop_are_accounted_for(flag: bool) -> None:
    model, x = Loop(), rows(4, 64)
    found, graph = compiled(model, x, dequant_at_load=flag)
    assert_same(found, model(x))
    reason = LEFT.format("while_loop") if flag else "the flag is not on"
    factor, inner = sorted(graph.weights, key=lambda row: row.name)
    assert (inner.name, inner.action, inner.reason) == ("inner.weight", "kept", reason)
    assert (factor.name, factor.action) == ("factor.weight", "unmatched")
    assert factor.reason == f"dequantized in every call for matmul, which is not linear; not folded: {reason}"
    assert not entries_of(model)


class Written(nn.Module):
    """A linear that is written out, in a branch within a checkpoint and a checkpoint within a branch."""

    def __init__(self, use: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.use = layer(64, 64), use

    def forward(self, x: Tensor) -> Tensor:
        def linear(x: Tensor) -> Tensor:
            return F.linear(x, mxfp8_ops.dequant(self.inner.weight, self.inner.weight_scale))

        return self.use(linear, x)


def checkpoint(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


def branch(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, function, lambda x: x + 1, (x,))


@pytest.mark.parametrize(
    "use",
    [
        lambda function, x: checkpoint(lambda x: branch(function, x), x),
        lambda function, x: branch(lambda x: checkpoint(function, x), x),
    ],
    ids=["branch within", "checkpoint within"],
)
def test_linears_in_nested_graphs_are_recognised_and_kept(
    use: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
) -> None:
    model, x = Written(use), rows(4, 64).abs()
    found, graph = compiled(model, x, dequant_at_load=True)
    assert_same(found, model(x))
    (row,) = graph.weights
    assert (row.name, row.action, row.reason) == ("inner.weight", "kept", LEFT.format("cond"))
    assert "mxfp8.linear" in graph.after
