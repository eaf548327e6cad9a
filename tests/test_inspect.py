"""``lowering.explain`` and ``lowering.capture``: every weight and graph of a compile, and nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from commands import SCHEMA, validate
from helpers import assert_same
from models import Chain, layer, rows
from torch import Tensor, nn

import lowering
import mxfp8_ops
from lowering import store
from mxfp8_ops import ops


class Mixed(nn.Module):
    """A weight of every kind: through ``linear``, through ``dequant``, written out, and not MXFP8."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.kept = layer(64, 64, seed=4)
        self.dense = nn.Linear(64, 64).bfloat16()
        packed = layer(64, 64, seed=5)
        self.table, self.table_scale = nn.Buffer(packed.weight.detach()), nn.Buffer(packed.weight_scale)
        packed = layer(64, 64, seed=6)
        self.other, self.other_scale = nn.Buffer(packed.weight.detach()), nn.Buffer(packed.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.kept(x)
        if self.broken:
            torch._dynamo.graph_break()
        scale = torch.exp2(self.other_scale.float() - 127).unsqueeze(-1)
        weight = (self.other.float().unflatten(-1, (-1, 32)) * scale).flatten(-2).to(x.dtype)
        x = self.dense(x) @ mxfp8_ops.dequant(self.table, self.table_scale).T
        return F.linear(x, weight)


@pytest.fixture(scope="module")
def mixed() -> dict[bool, lowering.Report]:
    """One report for each state of the flag, on a model with a graph break."""
    torch._dynamo.reset()
    with torch.no_grad():
        return {flag: lowering.explain(Mixed(broken=True), rows(), dequant_at_load=flag) for flag in (True, False)}


# --- explain -------------------------------------------------------------------------------------------------


def test_folded_kept_and_unmatched_weights_of_one_model_are_told_apart(mixed) -> None:
    def actions(report: lowering.Report) -> dict[str, str]:
        return {row.name: row.action for row in report.weights}

    assert actions(mixed[True]) == {"kept.weight": "folded", "table": "folded", "other": "unmatched"}
    assert actions(mixed[False]) == {"kept.weight": "kept", "table": "unmatched", "other": "unmatched"}
    assert [each.name for each in mixed[True].plain] == ["dense.weight"]


def test_kernels_are_those_of_the_generated_code(mixed) -> None:
    folded, kept = ({row.name: row.kernel for row in mixed[flag].weights} for flag in (True, False))
    assert kept["kept.weight"] == f"mxfp8.linear ({ops.kernel_name('linear', torch.device('cpu'))})"
    assert folded["kept.weight"] == "extern_kernels.addmm"
    loop, _, product = kept["table"].partition(" + ")
    assert loop.startswith("cpp_fused_dequant")
    assert product == "extern_kernels.mm"
    assert folded["other"].startswith("cpp_fused_")


def test_graph_break_is_reported_with_reason_and_place(mixed) -> None:
    first, second = mixed[True].graphs
    assert first.graph_break is not None
    assert first.graph_break.reason == "Call to `torch._dynamo.graph_break()`"
    assert first.graph_break.explanation.startswith("User-inserted graph break")
    assert first.graph_break.where.startswith("test_inspect.py:")
    assert first.graph_break.where.endswith(" in forward")
    assert second.graph_break is None
    assert mixed[True].breaks == []
    assert "graph 1 of 2 ends at a graph break: test_inspect.py:" in str(mixed[True])


def test_graph_break_before_any_operator_is_reported_too() -> None:
    def model(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.neg()

    report = lowering.explain(model, rows())
    assert [each.reason for each in report.breaks] == ["Call to `torch._dynamo.graph_break()`"]


def test_every_stage_from_dynamo_to_code_is_there_with_the_names_of_the_model(mixed) -> None:
    graph = mixed[False].graphs[1]
    assert set(graph.stages) == {"before", "after", "aot", "joint", "post-grad"}
    assert len(graph.code) == 1
    for stage in graph.stages:
        assert "input table: f8e4m3fn[64, 64]" in [line.text for line in graph.lines(stage)]
    assert "mxfp8.dequant_loop(table, table_scale, bfloat16)" in graph.post_grad[0]


def test_backward_graph_is_a_second_graph_of_its_stage() -> None:
    model = nn.Sequential(layer(64, 64))
    x = rows().requires_grad_()
    report = lowering.explain(lambda x: model(x).sum().backward(), x)
    (graph,) = [graph for graph in report.graphs if graph.weights]
    assert len(graph.stages["post-grad"]) == len(graph.code) == 2


@pytest.mark.parametrize("freezing", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_packed_weights_say_how_they_are_decoded_in_every_form_of_the_report(flag: bool, freezing: bool) -> None:
    model = nn.Sequential(layer(64, 64, seed=4), nn.Sequential(layer(64, 64, seed=5)))
    mxfp8_ops.pack_(model)
    with torch.no_grad():
        report = lowering.explain(model, rows(), dequant_at_load=flag, freezing=freezing)
    assert [row.name for row in report.weights] == ["0.weight_packed", "1.0.weight_packed"]
    assert report.counts == {"folded": 0, "kept": 2, "unmatched": 0}
    for row in validate(report)["runs"][0]["weights"]:
        assert (row["shape"], row["decoding"]) == ([64, 64], {"bfloat16": "fast"})
        assert row["kernel"] == "mxfp8.linear_packed (reference)"
        assert row["reason"].startswith("packed, fast decoding for bfloat16 (on GPUs; here unpacked in every call); ")
    size = 2 * model[0].weight_packed.nbytes
    assert (report.memory.before, report.memory.peak, report.memory.after) == (size, size, size)
    for text in (str(report), report.to_html(), report._repr_html_()):
        assert text.count("packed, fast decoding for bfloat16") == 2
    assert {line.weights for line in report.graphs[0].lines("post-grad") if line.reads} == {
        ("0.weight_packed",),
        ("1.0.weight_packed",),
    }


@pytest.mark.parametrize("freezing", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_json_follows_its_schema_and_is_the_same_twice(flag: bool, freezing: bool) -> None:
    def text() -> str:
        torch._dynamo.reset()
        with torch.no_grad():
            return lowering.explain(Chain(), rows(), dequant_at_load=flag, freezing=freezing).to_json()

    first, second = text(), text()
    assert first == second
    jsonschema.validate(json.loads(first), SCHEMA)


def test_json_has_no_paths_and_no_times(mixed) -> None:
    for report in mixed.values():
        text = json.dumps(validate(report))
        assert os.sep + "tmp" not in text
        assert str(Path.home()) not in text
        assert "seconds" not in text


def test_schema_rejects_what_is_not_in_it(mixed) -> None:
    document = validate(mixed[True])
    document["runs"][0]["weights"][0]["action"] = "lost"
    with pytest.raises(jsonschema.ValidationError, match="'lost' is not one of"):
        jsonschema.validate(document, SCHEMA)


def test_files_hold_what_is_returned(mixed, tmp_path: Path) -> None:
    for write, name in ((mixed[True].to_json, "r.json"), (mixed[True].to_html, "r.html")):
        assert write(tmp_path / name) == (tmp_path / name).read_text(encoding="utf-8")


def test_only_keeps_matching_weights_and_their_links(mixed) -> None:
    report = mixed[False].only("*ta?le*")
    assert [row.name for row in report.weights] == ["table"]
    assert {name for graph in report.graphs for line in graph.lines("before") for name in line.weights} == {"table"}
    assert len(mixed[False].weights) == 3


def test_explain_leaves_nothing_behind() -> None:
    """Dynamo itself keeps graphs of other tests: those that end in a graph break, even after a reset."""
    model = Chain()
    before, kept = lowering.report.recent(), set(store._entries)
    with torch.no_grad():
        report = lowering.explain(model, rows(), dequant_at_load=True)
    assert report.counts["folded"] == 2
    assert set(store._entries) <= kept
    weight = weakref.ref(model.up.weight)
    del model
    gc.collect()
    assert weight() is None
    assert len(lowering.report.recent()) == len(before) + 1


def test_explain_does_not_use_up_the_recompile_limit() -> None:
    model = Chain()
    expected = model(rows())
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            assert len(lowering.explain(model, rows(), dequant_at_load=True).weights) == 2
    with lowering.capture() as report:
        assert_same(torch.compile(model, backend="mxfp8", fullgraph=True)(rows()), expected)
    assert len(report.graphs) == 1


def test_explain_leaves_compiled_code_and_the_flag_of_others_alone() -> None:
    model = Chain()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(rows())
    lowering.explain(model, rows(), dequant_at_load=True)
    compiled(rows())
    assert counter.frame_count == 1


def test_compiled_models_are_explained_as_what_was_compiled() -> None:
    model = Chain()
    reports = [lowering.explain(torch.compile(each), rows()) for each in (model, model.forward)]
    assert [row.name for row in reports[0].weights] == ["up.weight", "down.weight"]
    assert reports[0].title == "Chain"
    assert len(reports[1].weights) == 2


def test_weights_have_the_names_of_the_model_in_whatever_frame_they_are_met() -> None:
    class Breaking(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.fc = layer(64, 64, seed=seed)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.fc(x)

    report = lowering.explain(nn.Sequential(Breaking(5), Breaking(6)), rows())
    assert [row.name for row in report.weights] == ["0.fc.weight", "1.fc.weight"]


def test_explain_passes_keyword_arguments_and_names_inputs_after_parameters() -> None:
    def model(x: Tensor, *, offset: Tensor) -> Tensor:
        return x + offset

    (graph,) = lowering.explain(model, rows(), kwargs={"offset": rows()}).graphs
    assert graph.before.splitlines()[:2] == ["input x: bf16[5, 64]", "input offset: bf16[5, 64]"]


def test_dynamic_shapes_are_asked_for() -> None:
    (graph,) = lowering.explain(layer(), rows(), dynamic=True).graphs
    assert "bf16[s" in graph.before


def test_explain_raises_what_the_model_raises() -> None:
    with pytest.raises(Exception, match=r"x must be \[\.\.\., 64\] for a weight of \[48, 64\]"):
        lowering.explain(layer(), torch.randn(3, 32))
    with pytest.raises(TypeError, match="dequant_at_load must be True, False or None"):
        lowering.explain(layer(), rows(), dequant_at_load="yes")  # type: ignore[arg-type]


def test_explain_with_the_compiler_off_says_so() -> None:
    with torch._dynamo.config.patch(disable=True):
        report = lowering.explain(layer(), rows())
    assert report.notes == ["nothing was compiled: TORCH_COMPILE_DISABLE is set"]
    validate(report)


def test_explain_in_threads_reports_each_its_own_graphs() -> None:
    models = [nn.Sequential(*[layer(64, 64, seed=i) for i in range(count)]) for count in (1, 2, 3)]
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(lambda model: lowering.explain(model, rows()), models))
    assert [(len(report.graphs), len(report.weights)) for report in reports] == [(1, 1), (1, 2), (1, 3)]


def test_explain_rejects_options_that_are_its_own_arguments() -> None:
    with pytest.raises(TypeError, match="options are Inductor's: dequant_at_load is none, see explain's arguments"):
        lowering.explain(layer(), rows(), options={"dequant_at_load": True})


def test_repr_is_one_line(mixed) -> None:
    assert repr(mixed[True]) == "<Report on Mixed: flag on, 2 folded, 0 kept, 1 unmatched>"
    assert mixed[True].only("nothing").notes == ["no MXFP8 weight that matches 'nothing'"]


def test_explain_with_passes_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_PASSES", "off")
    assert "note: MXFP8_PASSES is off" in str(lowering.explain(layer(), rows()))


def test_model_without_mxfp8_says_so() -> None:
    report = lowering.explain(nn.Linear(64, 32), torch.randn(2, 64))
    assert report.notes == ["no MXFP8 weight: swap linears with mxfp8_ops.quantize_(model)"]
    assert len(report.plain) == 1
    validate(report)


def test_two_hundred_linears_are_all_accounted_for_in_one_graph() -> None:
    model = nn.Sequential(*[layer(64, 64, seed=i) for i in range(200)])
    with torch.no_grad():
        report = lowering.explain(model, rows(), dequant_at_load=True)
    assert report.counts == {"folded": 200, "kept": 0, "unmatched": 0}
    (graph,) = report.graphs
    assert [line.weights for line in graph.lines("after") if line.reads] == [(f"{i}.weight",) for i in range(200)]
    assert {row.kernel for row in report.weights} == {"extern_kernels.addmm"}
    validate(report)
