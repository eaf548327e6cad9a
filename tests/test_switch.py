"""``enable()`` reaches every plain ``torch.compile``, and ``disable()`` leaves no trace."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
from helpers import assert_same
from models import Chain, layer, rows

import lowering
from lowering import report
from mxfp8_ops import Mxfp8Linear

ORIGINAL = inductor.compile_fx


def compile_and_report(model: Mxfp8Linear, **options: Any) -> list[tuple[str, str]]:
    with report.collect() as graphs:
        assert_same(torch.compile(model, fullgraph=True, **options)(rows()), model(rows()))
    return [(weight.name, weight.action) for graph in graphs for weight in graph.weights]


def test_plain_compile_folds_while_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "1")
    assert compile_and_report(layer()) == []
    lowering.enable()
    assert compile_and_report(layer()) == [("weight", "folded")]
    lowering.disable()
    torch._dynamo.reset()
    assert compile_and_report(layer()) == []


def test_model_compiled_before_is_compiled_again() -> None:
    model = layer()
    compiled = torch.compile(model, fullgraph=True)
    with report.collect() as graphs:
        for enabled in (False, True, False):
            if enabled:
                lowering.enable(dequant_at_load=True)
            else:
                lowering.disable()
            for _ in range(2):
                assert_same(compiled(rows()), model(rows()))
    assert [graph.weights[0].action for graph in graphs] == ["folded"]


def test_enable_twice_and_disable_once_restores_what_was_there() -> None:
    lowering.enable()
    lowering.enable(dequant_at_load=True)
    assert inductor.compile_fx is not ORIGINAL
    lowering.disable()
    assert inductor.compile_fx is ORIGINAL
    lowering.disable()
    assert inductor.compile_fx is ORIGINAL


def test_second_enable_changes_the_options() -> None:
    model = layer()
    lowering.enable(dequant_at_load=True)
    assert compile_and_report(model) == [("weight", "folded")]
    lowering.enable(dequant_at_load=False)
    assert compile_and_report(model) == [("weight", "kept")]


def test_somebody_else_patch_over_ours_survives_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_fx", ORIGINAL)  # what is restored after the test
    lowering.enable(dequant_at_load=True)
    ours, seen = inductor.compile_fx, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", theirs)
    lowering.disable()
    assert inductor.compile_fx is theirs
    assert compile_and_report(layer()) == []
    assert seen == [1]
    lowering.enable(dequant_at_load=True)
    torch._dynamo.reset()
    assert compile_and_report(layer()) == [("weight", "folded")]
    lowering.disable()
    assert inductor.compile_fx is theirs


def test_explicit_options_beat_the_switch() -> None:
    lowering.enable(dequant_at_load=True)
    assert compile_and_report(layer(), options=lowering.options(dequant_at_load=False)) == [("weight", "kept")]


def test_backend_is_lowered_once_while_enabled_and_by_its_own_options() -> None:
    lowering.enable(dequant_at_load=True)
    assert compile_and_report(layer(), backend="mxfp8") == [("weight", "kept")]
    assert compile_and_report(layer(), backend="mxfp8", options={"dequant_at_load": True}) == [("weight", "folded")]


def test_release_reaches_plain_compile() -> None:
    model = layer()
    expected = model(rows())
    lowering.enable(dequant_at_load=True, release_quantized=True)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(compiled(rows()), expected)
    with pytest.raises(ValueError, match="released"):
        model(rows())


def test_modes_and_options_of_plain_compile_still_count() -> None:
    lowering.enable(dequant_at_load=True)
    assert compile_and_report(layer(), mode="reduce-overhead") == [("weight", "folded")]
    assert compile_and_report(layer(), options={"max_autotune": True}) == [("weight", "folded")]


def test_enable_and_disable_from_many_threads_end_where_they_started() -> None:
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            lowering.enable()
            lowering.disable()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inductor.compile_fx is ORIGINAL


@pytest.mark.parametrize(("argument", "value"), [("dequant_at_load", "on"), ("release_quantized", None)])
def test_wrong_type_is_refused_and_nothing_is_enabled(argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be"):
        lowering.enable(**{argument: value})
    assert inductor.compile_fx is ORIGINAL


def test_models_without_mxfp8_compile_as_before() -> None:
    lowering.enable(dequant_at_load=True)
    model = torch.nn.Linear(8, 8)
    with report.collect() as graphs:
        torch.testing.assert_close(torch.compile(model)(torch.ones(2, 8)), model(torch.ones(2, 8)))
    assert [graph.weights for graph in graphs] == [[]]


def test_graph_breaks_give_a_report_for_each_graph() -> None:
    lowering.enable(dequant_at_load=True)
    model = Chain()

    def broken(x: torch.Tensor) -> torch.Tensor:
        hidden = model.up(x)
        torch._dynamo.graph_break()
        return model.down(hidden)

    with report.collect() as graphs:
        torch.testing.assert_close(torch.compile(broken)(rows()), broken(rows()))
    assert [[weight.name for weight in graph.weights] for graph in graphs] == [
        ["model.up.weight"],
        ["model.down.weight"],
    ]
