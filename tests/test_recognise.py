"""``F.linear(x, dequant(w, s))`` written by hand is ``linear(x, w, s)``, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import all_codes, assert_same
from models import folding, layer, rows
from torch import Tensor, fx

import lowering
from lowering import report
from mxfp8_ops import dequant, linear, ops

PACKED = layer()
W, S, B = PACKED.weight, PACKED.weight_scale, PACKED.bias.detach()
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

RECOGNISED: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "plain": (BF16, lambda x: F.linear(x, dequant(W, S))),
    "with bias": (BF16, lambda x: F.linear(x, dequant(W, S), B)),
    "with keywords": (BF16, lambda x: F.linear(input=x, weight=dequant(W, S), bias=B)),
    "in x's dtype": (F32, lambda x: F.linear(x, dequant(W, S, x.dtype), B.to(x.dtype))),
    "cast that does nothing": (BF16, lambda x: F.linear(x, dequant(W, S).to(x.dtype))),
    "cast from float32": (BF16, lambda x: F.linear(x, dequant(W, S, F32).to(x.dtype))),
    "cast from float32 by name": (F16, lambda x: F.linear(x, dequant(W, S, F32).half())),
    "cast by keyword": (F16, lambda x: F.linear(x, dequant(W, S, F32).to(dtype=x.dtype))),
    "bfloat16 to float16": (F16, lambda x: F.linear(x, dequant(W, S).to(x.dtype))),
    "aten": (BF16, lambda x: torch.ops.aten.linear(x, dequant(W, S), B)),
    "e8m0 scale": (BF16, lambda x: F.linear(x, dequant(W, S.view(torch.float8_e8m0fnu)))),
    "three dimensions": (BF16, lambda x: F.linear(x[None], dequant(W, S))),
}

LEFT_ALONE: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "bfloat16 to float32, which rounds scale bytes below 3": (F32, lambda x: F.linear(x, dequant(W, S).to(x.dtype))),
    "float16 to bfloat16": (BF16, lambda x: F.linear(x, dequant(W, S, F16).to(x.dtype))),
    "float32 to bfloat16 and back": (F32, lambda x: F.linear(x, dequant(W, S, F32).to(BF16).to(F32))),
    "a computed weight": (BF16, lambda x: F.linear(x, dequant(W, S) * 2)),
    "a sliced weight": (BF16, lambda x: F.linear(x, dequant(W, S)[:7])),
}


def lowered(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, fx.Graph]:
    graphs = []

    def backend(gm: fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        from lowering.backend import Options, lower

        def inductor(lowered: fx.GraphModule, inputs: object, config_patches: object) -> Callable[..., object]:
            graphs.append(lowered.graph)
            return lowered.forward

        return lower(gm, inputs, Options(), {}, inductor)

    return torch.compile(model, backend=backend, fullgraph=True)(x), graphs[0]


def calls(graph: fx.Graph, target: object) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("form", RECOGNISED)
def test_form_becomes_one_linear(form: str) -> None:
    dtype, model = RECOGNISED[form]
    x = rows(dtype=dtype)
    actual, graph = lowered(model, x)
    assert calls(graph, ops.linear) == 1
    assert calls(graph, ops.dequant) == 0
    assert_same(actual, model(x))


@pytest.mark.parametrize("form", LEFT_ALONE)
def test_form_is_left_alone(form: str) -> None:
    dtype, model = LEFT_ALONE[form]
    x = rows(dtype=dtype)
    actual, graph = lowered(model, x)
    assert calls(graph, ops.linear) == 0
    assert calls(graph, ops.dequant) == 1
    assert_same(actual, model(x))


def test_casts_that_are_taken_away_lose_nothing_for_any_code() -> None:
    weight, scale = all_codes()
    for through, to in ((F32, BF16), (F32, F16), (BF16, F16)):
        assert_same(dequant(weight, scale, through).to(to), dequant(weight, scale, to))


def test_casts_that_are_kept_lose_something() -> None:
    weight, scale = all_codes()
    for through, to in ((BF16, F32), (F16, BF16), (F16, F32)):
        assert not torch.equal(
            dequant(weight, scale, through).to(to).nan_to_num(), dequant(weight, scale, to).nan_to_num()
        )


def test_autocast_form_becomes_one_linear_in_the_autocast_dtype() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return F.linear(x, dequant(W, S, x.dtype))

    x = rows(dtype=F32)
    actual, graph = lowered(model, x)
    assert calls(graph, ops.linear) == 1
    assert_same(actual, model(x))


def test_dequantized_weight_with_another_reader_stays_for_it() -> None:
    def model(x: Tensor) -> Tensor:
        dense = dequant(W, S)
        return F.linear(x, dense) + dense.sum()

    actual, graph = lowered(model, rows())
    assert calls(graph, ops.linear) == calls(graph, ops.dequant) == 1
    assert_same(actual, model(rows()))


@pytest.mark.parametrize("flag", [True, False])
def test_hand_written_form_folds_and_is_kept_like_linear(flag: bool) -> None:
    with report.collect() as graphs:
        for model in (lambda x: F.linear(x, dequant(W, S), B), lambda x: linear(x, W, S, B)):
            torch.compile(model, backend=folding(dequant_at_load=flag), fullgraph=True)(rows())
    by_hand, by_name = graphs
    assert sorted(by_hand.after.splitlines()) == sorted(by_name.after.splitlines())  # inputs come in another order
    assert by_hand.weights == by_name.weights


def test_options_recognise_the_form_as_well() -> None:
    with report.collect() as graphs, torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(lambda x: F.linear(x, dequant(W, S), B), options=lowering.options(), fullgraph=True)
        assert_same(compiled(rows()), linear(rows(), W, S, B))
    assert "mxfp8.linear(" in graphs[0].post_grad[0]
    assert "dequant" not in graphs[0].post_grad[0]


def test_gradients_of_the_recognised_form_are_those_of_eager() -> None:
    def model(x: Tensor) -> Tensor:
        return F.linear(x, dequant(W, S, x.dtype)).square().sum()

    x = rows(dtype=F32).requires_grad_()
    (expected,) = torch.autograd.grad(model(x), x)
    for flag in (True, False):
        compiled = torch.compile(model, backend="mxfp8", options={"dequant_at_load": flag}, fullgraph=True)
        assert_same(torch.autograd.grad(compiled(x), x)[0], expected)
