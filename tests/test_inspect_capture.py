"""``lowering.capture``: what a compile of the user's own did, and what came from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import validate
from models import layer, rows
from torch import Tensor, nn

import lowering

# --- capture -------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch(force_disable_caches=False):
        yield


@pytest.mark.usefixtures("fresh_cache")
def test_code_from_disk_is_a_cache_hit_with_its_weights() -> None:
    def run() -> lowering.Report:
        torch._dynamo.reset()
        with torch.no_grad(), lowering.capture("mine") as report:
            torch.compile(layer(), backend="mxfp8", options={"dequant_at_load": True})(rows())
        return report

    first, second = run(), run()
    assert first.notes == []
    assert first.weights[0].kernel == "aten.addmm"
    (note,) = second.notes
    assert note == "cache hit: the code of 1 of 1 graphs was found on disk, not generated"
    assert second.weights[0].action == "folded"
    assert second.weights[0].kernel == "linear"
    for report in (first, second):
        assert validate(report)["runs"][0]["graphs"][0]["from_cache"] == (report is second)


def test_code_from_memory_is_a_cache_hit_that_says_how_to_see_it() -> None:
    compiled = torch.compile(layer(), backend="mxfp8")
    compiled(rows())
    with lowering.capture() as report:
        compiled(rows())
        compiled(rows())
    assert report.graphs == []
    assert report.notes[0].startswith("cache hit: 2 calls ran code compiled earlier in this process")


def test_capture_without_a_compile_says_so() -> None:
    with lowering.capture() as report:
        layer()(rows())
        torch.compile(layer())(rows())
    assert report.notes == ['nothing was compiled through backend="mxfp8", enable() or options()']


WAYS: list[Callable[[nn.Module], Callable[..., Tensor]]] = [
    lambda model: torch.compile(model, backend="mxfp8"),
    lambda model: torch.compile(model, options=lowering.options()),
    lambda model: torch.compile(model),
]


@pytest.mark.parametrize("way", WAYS)
def test_capture_sees_every_way_in(way: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    if way is WAYS[2]:
        lowering.enable()
    with torch.no_grad(), lowering.capture() as report:
        way(layer())(rows())
    assert [(row.name, row.action) for row in report.weights] == [("weight", "kept")]


def test_capture_is_complete_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="mine"), lowering.capture() as report:  # noqa: PT012
        torch.compile(layer(), backend="mxfp8")(rows())
        raise RuntimeError("mine")
    assert report.seconds > 0
    assert len(report.weights) == 1


def test_listening_puts_torch_back_as_it_was() -> None:
    from torch._inductor.graph import GraphLowering

    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphLowering, "save_output_code", staticmethod(seen.append))
        with lowering.capture(), torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
            torch.compile(layer(), backend="mxfp8")(rows())
        assert GraphLowering.save_output_code == seen.append
        assert len(seen) == 1
    with lowering.capture():
        assert GraphLowering.save_output_code is not None
    assert GraphLowering.save_output_code is None


def test_nested_captures_see_the_same_and_record_code_once() -> None:
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), lowering.capture() as outer:
        with lowering.capture() as inner:
            torch.compile(layer(), backend="mxfp8")(rows())
        lowering.explain(layer(), rows())
    assert [len(report.graphs) for report in (inner, outer)] == [1, 2]
    assert [len(graph.code) for graph in outer.graphs] == [1, 1]


def test_captures_that_overlap_in_any_order_leave_torch_as_it_was() -> None:
    from torch._inductor.graph import GraphLowering

    compiled = torch.compile(layer(), backend="mxfp8")
    compiled(rows())
    first, second = lowering.capture(), lowering.capture()
    reports = [first.__enter__(), second.__enter__()]
    first.__exit__(None, None, None)
    compiled(rows())
    second.__exit__(None, None, None)
    compiled(rows())
    assert [report.reused for report in reports] == [0, 1]
    assert GraphLowering.save_output_code is None


def test_code_of_graphs_that_are_not_ours_is_not_attributed_to_ours() -> None:
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), lowering.capture() as report:
        torch.compile(layer(), backend="mxfp8")(rows())
        torch.compile(torch.neg)(rows())
    (graph,) = report.graphs
    assert len(graph.code) == 1
    assert "neg" not in graph.code[0].text


def test_backward_compiled_after_other_graphs_belongs_to_its_own_report() -> None:
    models = [nn.Sequential(layer(64, 64, seed=i)) for i in (1, 2)]
    inputs = [rows(m).requires_grad_() for m in (3, 5)]
    with torch._inductor.config.patch(force_disable_caches=True), lowering.capture() as report:
        outputs = [torch.compile(model, backend="mxfp8")(x) for model, x in zip(models, inputs, strict=True)]
        for output in outputs:
            output.sum().backward()
    assert [len(graph.stages["post-grad"]) for graph in report.graphs] == [2, 2]
    assert [len(graph.code) for graph in report.graphs] == [2, 2]
