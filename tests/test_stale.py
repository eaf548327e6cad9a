"""No flag, cache, recompile or weight update makes an answer stale."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from models import Chain, folding, layer, rows
from torch import nn

import lowering
import mxfp8_ops
from lowering import report
from mxfp8_ops import Mxfp8Linear

ROOT = Path(__file__).parents[1]
ON = {"dequant_at_load": True}
PACKED = {"dequant_at_load": False, "pack_at_load": True}
FORMS = pytest.mark.parametrize("options", [ON, PACKED], ids=["dequantized", "packed"])


def replace_weight(model: Mxfp8Linear) -> None:
    model.weight = nn.Parameter(layer(seed=9).weight, requires_grad=False)


def update_weight_in_place(model: Mxfp8Linear) -> None:
    with torch.no_grad():
        model.weight.copy_(layer(seed=9).weight)


def update_part_of_the_weight_through_a_view(model: Mxfp8Linear) -> None:
    with torch.no_grad():
        model.weight[3].view(torch.uint8).zero_()


def load_other_weights(model: Mxfp8Linear) -> None:
    model.load_state_dict(layer(seed=9).state_dict())


def assign_other_weights(model: Mxfp8Linear) -> None:
    model.load_state_dict(layer(seed=9).state_dict(), assign=True)


def swap_data(model: Mxfp8Linear) -> None:
    model.weight.data = layer(seed=9).weight.detach().clone()


def see_data_by_other_strides(model: Mxfp8Linear) -> None:
    model.weight.data = model.weight.data.as_strided(model.weight.shape, (0, 1))


def update_scale_in_place(model: Mxfp8Linear) -> None:
    model.weight_scale.add_(1)


def replace_scale(model: Mxfp8Linear) -> None:
    model.weight_scale = model.weight_scale + 2


CHANGES = [
    replace_weight,
    update_weight_in_place,
    update_part_of_the_weight_through_a_view,
    load_other_weights,
    assign_other_weights,
    swap_data,
    see_data_by_other_strides,
    update_scale_in_place,
    replace_scale,
]


@FORMS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_graph_with_weights_made_at_load_sees(change: Callable[[Mxfp8Linear], None], options: dict[str, bool]) -> None:
    model, x = layer(), rows()
    compiled = torch.compile(model, backend=folding(**options), fullgraph=True)
    before = compiled(x)
    assert_same(before, model(x))
    change(model)
    for _ in range(2):
        after = compiled(x)
        assert_same(after, model(x))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    ("way", "options"), [("backend", ON), ("enable", ON), ("backend", PACKED)], ids=["backend", "enable", "packed"]
)
def test_frozen_graph_sees(change: Callable[[Mxfp8Linear], None], way: str, options: dict[str, bool]) -> None:
    model, x = layer(), rows()
    if way == "enable":
        lowering.enable(**options)
    arguments = {"backend": "mxfp8", "options": options} if way == "backend" else {}
    with torch.no_grad(), torch._inductor.config.patch(freezing=True), report.collect() as graphs:
        compiled = torch.compile(model, fullgraph=True, **arguments)
        before = compiled(x)
        change(model)
        for _ in range(2):
            after = compiled(x)
            assert_same(after, model(x))
    assert not torch.equal(before, after)
    made = [each.weights[0].bytes_dequantized or each.weights[0].bytes_packed for each in graphs]
    assert len(made) == 2  # compiled again, and made again
    assert all(made)


def test_weight_changed_between_two_graphs_of_one_call_is_seen() -> None:
    model, x = layer(), rows()

    def twice(x: torch.Tensor) -> list[torch.Tensor]:
        first = model(x)
        torch._dynamo.graph_break()
        model.weight_scale.add_(1)
        torch._dynamo.graph_break()
        return [first, model(x)]

    for _ in range(3):
        scale = model.weight_scale.clone()
        first, second = torch.compile(twice, backend=folding(**ON))(x)
        assert_same(second, model(x))
        model.weight_scale.copy_(scale)
        assert_same(first, model(x))


@FORMS
def test_change_without_a_trace_is_seen_after_refresh(options: dict[str, bool]) -> None:
    model, x = layer(), rows()
    compiled = torch.compile(model, backend=folding(**options), fullgraph=True)
    before = compiled(x)
    model.weight.data.copy_(layer(seed=9).weight)
    assert_same(compiled(x), before)  # the limit that the README states
    lowering.refresh(model)
    assert_same(compiled(x), model(x))
    assert not torch.equal(before, model(x))


def test_change_without_a_trace_in_a_frozen_graph_is_seen_after_refresh() -> None:
    model, x = layer(), rows()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, backend="mxfp8", options=ON, fullgraph=True)
        compiled(x)
        model.weight.data.copy_(layer(seed=9).weight)
        lowering.refresh(model)
        for _ in range(2):
            assert_same(compiled(x), model(x))


def test_flag_flipped_between_compiles_in_one_process_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Chain(), rows()
    for flag in ("0", "1", "0", "off", "on"):
        monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", flag)
        with report.collect() as graphs:
            assert_same(torch.compile(model, backend="mxfp8")(x), model(x))
        actions = {weight.action for weight in report.distinct(graphs)}
        expected = {"folded"} if flag in ("1", "on") else {"kept"}
        assert actions <= expected  # none where Dynamo finds the graph it made for this very flag
        assert actions or flag in ("0", "1")[: 2 if flag == "0" else 0]


def test_flag_flipped_under_a_compiled_model_takes_effect_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Chain(), rows()
    compiled = torch.compile(model, backend="mxfp8", fullgraph=True)
    seen = []
    for flag in (None, "1", "0"):
        if flag is not None:
            monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", flag)
        with report.collect() as graphs:
            assert_same(compiled(x), model(x))
        seen.append({weight.action for weight in report.distinct(graphs)})
    assert seen == [{"kept"}, {"folded"}, {"kept"}]


def compile_under(flags: str) -> list[str]:
    """What becomes of the weights under each flag, and of how many graphs code is generated."""
    found = []
    for flag in flags:
        os.environ["MXFP8_DEQUANT_AT_LOAD"] = flag
        torch._dynamo.reset()
        model, x = layer(41, 96), rows(3, 96)  # which no other test has in the cache
        with torch.no_grad(), report.collect() as graphs:
            assert_same(torch.compile(model, backend="mxfp8", fullgraph=True)(x), model(x))
        (action,) = {weight.action for graph in graphs for weight in graph.weights}
        found.append(f"{action} {len(graphs[0].post_grad)}")
    return found


def in_another_process(flags: str, packages: Path) -> list[str]:
    program = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import test_stale as t"
    command = [sys.executable, "-c", f"{program}; print(*t.compile_under({flags!r}), sep='\\n')"]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    done = subprocess.run(command, env=environment, cwd=packages, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_processes_that_share_a_cache_share_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    for name in ("mxfp8_ops", "lowering"):
        shutil.copytree(ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "")  # and undone in the end
    assert compile_under("0") == ["kept 1"]
    # The second one is found in the cache, and not generated again.
    assert in_another_process("10", packages) == ["folded 1", "kept 0"]
    with open(packages / "lowering" / "kernels.py", "a") as source:
        source.write("\n# an upgrade\n")
    assert in_another_process("1", packages) == ["folded 1"]


def test_pass_identity_covers_source_and_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowering import passes

    own = passes.LowerPass()
    off = own.uuid()
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "1")
    on = own.uuid()
    monkeypatch.setattr(passes, "source_hash", lambda: b"other")
    assert len({off, on, own.uuid(), passes.RecognisePass().uuid()}) == 4


def test_graph_cached_under_one_autocast_dtype_is_not_found_under_another() -> None:
    model, x = layer(dtype=torch.float32), rows(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        torch._dynamo.reset()
        with torch.no_grad(), torch.autocast("cpu", dtype):
            assert_same(torch.compile(model, backend="mxfp8", fullgraph=True)(x), model(x))


def test_plain_compile_is_not_stale_either() -> None:
    model, x = layer(), rows()
    compiled = torch.compile(model, fullgraph=True)
    compiled(x)
    for change in CHANGES:
        change(model)
        assert_same(compiled(x), mxfp8_ops.linear(x, model.weight, model.weight_scale, model.bias))
