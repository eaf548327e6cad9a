"""Linears on the same x become one, and only where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from models import folding, layer, rows
from torch import Tensor, nn

from lowering import report
from lowering.graph import is_linear, is_linear_packed, is_plain_linear
from lowering.report import GraphReport
from mxfp8_ops import Mxfp8Linear

MERGE = {"dequant_at_load": False, "pack_at_load": True, "merge_linears": True}
FOLD = {"dequant_at_load": True, "merge_linears": True}


def plain(n: int, seed: int, **how: Any) -> Mxfp8Linear:
    return layer(n, 64, seed=seed, bias=False, **how)


class Block(nn.Module):
    """Queries, keys and values with heads, then gate and up, with sizes that fill no tile."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = plain(64, 3), plain(32, 4), plain(32, 5)
        self.gate, self.up = plain(300, 6), plain(7, 7)

    def forward(self, x: Tensor) -> list[Tensor]:
        shape = (*x.shape[:-1], -1, 16)
        heads = [each(x).view(shape).transpose(0, 1) * 1 for each in (self.q, self.k, self.v)]
        one = x + 1
        hidden = self.gate(one).amax(-1, keepdim=True) + self.up(one)
        return [*heads, hidden, self.gate(x + 2) + 1]


def merged(model: Callable[..., Any], *inputs: Tensor, **options: Any) -> tuple[Any, GraphReport]:
    with report.collect() as graphs, torch.no_grad():
        result = torch.compile(model, backend=folding(**(MERGE | options)), fullgraph=True)(*inputs)
    return result, graphs[0]


def partners(graph: GraphReport) -> set[str]:
    return {row.name for row in graph.weights if "one linear with" in row.reason}


class Two(nn.Module):
    """Two linears, and something made of their results."""

    def __init__(self, function: Callable[..., Any], one: Mxfp8Linear | None = None) -> None:
        super().__init__()
        self.function, self.one, self.other = function, one or plain(48, 3), plain(16, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.one(x), self.other(x), x)


@pytest.mark.parametrize("options", [MERGE, FOLD], ids=["packed", "dequantized"])
def test_projections_of_one_x_are_one_call_with_the_same_results(options: dict[str, bool]) -> None:
    model, x = Block(), rows()
    calls: list[int] = []

    def inductor(gm: torch.fx.GraphModule, inputs: Any, config_patches: Any) -> Any:
        calls.append(sum(is_linear(n) or is_linear_packed(n) or is_plain_linear(n) for n in gm.graph.nodes))
        return gm.forward

    def compile_graph(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        from lowering import Options, backend

        return backend.lower(gm, inputs, Options(**options), {}, inductor)

    with torch.no_grad():
        for actual, expected in zip(torch.compile(model, backend=compile_graph)(x), model(x), strict=True):
            assert_same(actual, expected)
    assert calls == [3]  # of six: gate is called once more alone


def test_inductor_computes_the_same() -> None:
    model, x = Block(), rows()
    with torch.no_grad():
        compiled = torch.compile(model, backend="mxfp8", options=MERGE, fullgraph=True)
        for actual, expected in zip(compiled(x), model(x), strict=True):
            assert_same(actual, expected)


def test_nothing_is_merged_unasked_on_the_cpu() -> None:
    _, graph = merged(Block(), rows(), merge_linears=None)
    assert partners(graph) == set()


def test_the_report_names_partners_and_shares_out_the_bytes() -> None:
    _, graph = merged(Two(lambda a, b, x: F.pad(b, (0, 32)) + a), rows())
    one, other = graph.weights
    assert one.reason.endswith("at load, one linear with other.weight")
    assert other.reason.endswith("at load, one linear with one.weight")
    assert one.bytes_packed + other.bytes_packed == 4 * (132 + 1) * 32  # a block of 128 rows and 128 columns, the marks
    assert one.bytes_packed == 3 * other.bytes_packed
    assert "input one.weight+other.weight.packed" in graph.after


APART: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "a result is returned": lambda: (Two(lambda a, b, x: (a, b + 1)), None),
    "a result is written to": lambda: (Two(lambda a, b, x: (a.add_(1) * 1, b + 1)), None),
    "a view that a slice cannot have": lambda: (Two(lambda a, b, x: (a.view(-1) * 1, b + 1)), None),
    "a bias": lambda: (Two(lambda a, b, x: (a + 1, b + 1), layer(48, 64)), None),
    "x is written to": lambda: (Two(lambda a, b, x: (a + 1, b + 1, x.add_(0) * 1)), None),
}


@pytest.mark.parametrize("case", APART)
def test_linears_stay_apart_where(case: str) -> None:
    model, _ = APART[case]()
    actual, graph = merged(model, rows())
    assert partners(graph) == set()
    for each, expected in zip(actual, model(rows()), strict=True):
        assert_same(each, expected)


def test_linears_on_different_x_stay_apart() -> None:
    one, other = plain(48, 3), plain(48, 4)
    _, graph = merged(lambda x: one(x) + other(x + 1), rows())
    assert partners(graph) == set()


def test_a_weight_that_is_computed_is_left_out_of_the_others() -> None:
    one, other, third = plain(48, 3), plain(48, 4), plain(48, 5)

    def model(x: Tensor) -> Tensor:
        computed = Mxfp8Linear.forward(third, x) if False else F.linear(x, third.weight.float().to(x.dtype) * 2)
        return one(x) + other(x) + computed

    _, graph = merged(model, rows())
    assert {name.split(".")[0] for name in partners(graph)} == {"one", "other"}


@pytest.mark.parametrize("part", ["one", "other"])
def test_a_change_of_any_part_is_seen(part: str) -> None:
    model, x = Two(lambda a, b, x: F.pad(b, (0, 32)) + a), rows()
    with torch.no_grad():
        compiled = torch.compile(model, backend=folding(**MERGE), fullgraph=True)
        before = compiled(x)
        for change in (
            lambda each: each.weight_scale.add_(1),
            lambda each: each.weight.view(torch.uint8).bitwise_xor_(0x80),
            lambda each: setattr(each, "weight", nn.Parameter(plain(len(each.weight), 9).weight, requires_grad=False)),
        ):
            change(getattr(model, part))
            after = compiled(x)
            assert_same(after, model(x))
            assert not torch.equal(before, after)
            before = after


def test_one_graph_for_every_number_of_rows() -> None:
    model = Block()
    with report.collect() as graphs, torch.no_grad():
        compiled = torch.compile(model, backend=folding(**MERGE), fullgraph=True, dynamic=True)
        for m in (2, 3, 5, 17):
            for actual, expected in zip(compiled(rows(m)), model(rows(m)), strict=True):
                assert_same(actual, expected)
    assert len(graphs) == 1
    assert len(partners(graphs[0])) == 5


def test_release_frees_every_part_and_needs_them_merged_again() -> None:
    model = Two(lambda a, b, x: F.pad(b, (0, 32)) + a)
    expected = model(rows())
    with torch.no_grad():
        compiled = torch.compile(model, backend=folding(release_quantized=True, **MERGE), fullgraph=True)
        assert_same(compiled(rows()), expected)
        for each in (model.one, model.other):
            with torch._C.DisableTorchFunctionSubclass():
                assert each.weight.untyped_storage().nbytes() == 0
        torch._dynamo.reset()
        assert_same(torch.compile(model, backend=folding(**MERGE), fullgraph=True)(rows()), expected)
        with pytest.raises(Exception, match=r"was released .* cannot be packed again"):
            torch.compile(model.one, backend=folding(**MERGE), fullgraph=True)(rows())


def test_layers_with_one_graph_have_merged_weights_of_their_own() -> None:
    models = [Two(lambda a, b, x: F.pad(b, (0, 32)) + a, plain(48, seed)) for seed in (3, 8)]
    with torch.no_grad():
        compiled = [torch.compile(each, backend=folding(**MERGE), fullgraph=True) for each in models]
        for _ in range(2):
            for each, model in zip(compiled, models, strict=True):
                assert_same(each(rows()), model(rows()))


def test_gradients_of_x_are_those_of_eager() -> None:
    model = Two(lambda a, b, x: (F.pad(b, (0, 32)) + a).sum())
    compiled = torch.compile(model, backend="mxfp8", options=MERGE, fullgraph=True)
    gradients = []
    for run in (model, compiled):
        x = rows().requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
    assert_same(*gradients)
