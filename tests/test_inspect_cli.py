"""The console command mxfp8-inspect: every option, every target, every error."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run
from models import layer

import mxfp8_ops
from lowering.inspect import cli, targets, terminal

ROOT = Path(__file__).parent.parent

# --- what it prints ------------------------------------------------------------------------------------------


def test_json_of_two_processes_is_the_same_and_output_in_a_pipe_has_no_colour_and_no_wrapped_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(number: int) -> list[str]:
        return ["models_here:two_layers", "--json", f"{number}.json", "--html", f"{number}.html"]

    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "1")
    command = [sys.executable, str(ROOT / "scripts" / "inspect_graph.py"), *options(1)]
    environment = os.environ | {"COLUMNS": "40", "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "+linear: bf16[8, 96] = linear(input, 0.weight.dequantized, None)" in done.stdout
    assert re.search(
        r"0\.weight +96x64 +folded +6,336 +18,624 +extern_kernels\.mm +dequantized to bfloat16", done.stdout
    )
    assert "\nwrote 1.json\nwrote 1.html\n" in done.stdout
    assert (folder / "1.html").read_text().startswith("<!doctype html>")
    status, _, err = run(*options(2))
    assert (status, err) == (0, "")
    assert (folder / "1.json").read_text() == (folder / "2.json").read_text()


@pytest.mark.parametrize(("no_color", "expected"), [(False, True), (True, False)])
def test_terminal_has_colours_unless_no_color_is_set(folder: Path, no_color: bool, expected: bool, monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    on = terminal.console(file=io.StringIO(), force_terminal=True, width=100)
    target = targets.load("models_here:two_layers")
    args = cli.parse_arguments(["x", "--dequant-at-load", "on"])
    text = terminal.render([cli.inspected(target, "on", args, lambda what: None)], on)
    assert bool(re.search(r"\x1b\[3[0-9]m", text)) is expected
    assert "folded" in text


@pytest.mark.parametrize("width", [20, 60, 79])
def test_narrow_terminal_stacks_what_a_wide_one_tabulates(folder: Path, width: int) -> None:
    args = cli.parse_arguments(["x"])
    reports = [cli.inspected(targets.load("models_here:two_layers"), "on", args, lambda what: None)]
    on = terminal.console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, no_color=True)
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.render(reports, on))
    line = "  folded 96x64, 6,336 -> 18,624 bytes, extern_kernels.mm"
    assert f"0.weight\n{line}\n  dequantized to bfloat16\n" in text


def test_long_output_on_a_terminal_goes_through_the_pager(monkeypatch: pytest.MonkeyPatch) -> None:
    paged: list[str] = []
    monkeypatch.setattr("pydoc.pager", paged.append)
    on = terminal.console(file=io.StringIO(), force_terminal=True, height=10)
    for text, pager in (("short\n", True), ("long\n" * 50, False), ("long\n" * 50, True)):
        terminal.show(text, on, pager)
    assert paged == ["long\n" * 50]
    monkeypatch.setenv("PAGER", "no-such-pager --plain")
    terminal.show("long\n" * 50, on)
    assert len(paged) == 1
    assert on.file.getvalue() == "short\n" + "long\n" * 100  # type: ignore[attr-defined]


# --- options -------------------------------------------------------------------------------------------------


def test_unset_ignores_the_environment_and_leaves_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "1")
    assert " kept " in run("models_here:two_layers", "--dequant-at-load", "unset")[1]
    assert os.environ["MXFP8_DEQUANT_AT_LOAD"] == "1"
    assert " folded " in run("models_here:two_layers")[1]


def test_freezing_folds_constants(folder: Path) -> None:
    _, out, _ = run("models_here:two_layers", "--freezing", "--dequant-at-load", "on", "--stage", "post-grad")
    assert out.count("frozen, dequantized to bfloat16") == 2
    assert "constant 0.weight.dequantized: bf16[64, 96]" in out


def test_dynamic_has_symbolic_sizes(folder: Path) -> None:
    assert re.search(r"input x: bf16\[s\d+, 64\]", run("models_here:by_hand", "--dynamic", "--stage", "aot")[1])


def test_dtype_converts_activations_and_leaves_packed_weights(folder: Path) -> None:
    _, out, _ = run("models_here:two_layers", "--dtype", "float32", "--stage", "aot")
    assert "input 0.weight: f8e4m3fn[96, 64]" in out
    assert "input input: f32[8, 64]" in out


def test_dtype_leaves_packed_buffers_of_any_module(folder: Path) -> None:
    _, out, _ = run("models_here:by_hand", "--dtype", "float16", "--stage", "aot")
    assert "input w: f8e4m3fn[32, 64]" in out
    assert "input x: f16[4, 64]" in out


def test_device_moves_model_and_inputs(folder: Path) -> None:
    target = targets.load("models_here:two_layers", device="meta")
    assert {target.inputs[0].device.type, target.model[0].weight.device.type} == {"meta"}  # type: ignore[index]
    assert run("models_here:two_layers", "--device", "cpu")[0] == 0


STAGES = {
    "dynamo": "before and after",
    "aot": ": aot\n",
    "joint": ": joint\n",
    "post-grad": ": post-grad\n",
    "code": "extern_kernels",
}


@pytest.mark.parametrize("stage", [*STAGES, "all"])
def test_stage_prints_that_stage_and_no_other(folder: Path, stage: str) -> None:
    _, out, _ = run("models_here:two_layers", "--dequant-at-load", "on", "--stage", stage)
    _, _, graphs = out.partition("== graph")
    assert [name for name, sign in STAGES.items() if sign in graphs] == (list(STAGES) if stage == "all" else [stage])


def test_weights_reduces_table_and_diff(folder: Path) -> None:
    _, out, _ = run("models_here:two_layers", "--dequant-at-load", "on", "--weights", "1.*", "--context", 0)
    assert "total: 1 weight" in out
    assert "1.weight.dequantized" in out
    assert "-input 1.weight" in out
    _, _, nothing = run("models_here:two_layers", "--weights", "2.*")
    assert nothing == "mxfp8-inspect: no weight matches '2.*': they are called 0.weight, 1.weight\n"


def test_weights_says_when_nothing_was_done_to_them(folder: Path) -> None:
    _, out, _ = run("models_here:breaking", "--dequant-at-load", "on", "--weights", "first.*", "--context", 0)
    first, _, second = out.partition("== graph 2 of 2")
    assert "-input first.weight" in first
    assert "(nothing changed in these weights)" in second


def test_options_may_come_before_the_target(folder: Path) -> None:
    for options in (["--dequant-at-load", "on"], ["--stage", "aot"], ["--fail-on", "unmatched"]):
        status, out, _ = run(*options, "models_here:two_layers")
        assert (status, "total: 2 weights" in out) == (0, True)


def test_a_word_given_twice_counts_once(folder: Path) -> None:
    assert "side by side" not in run("models_here:two_layers", "--dequant-at-load", "on", "on")[1]


@pytest.mark.parametrize(
    ("flag", "fail_on", "status", "message"),
    [
        ("on", ["folded"], 1, "2 folded: fc.weight, w"),
        ("on", ["kept", "unmatched"], 0, ""),
        ("off", ["kept"], 1, "1 kept: fc.weight"),
        ("off", ["unmatched"], 1, "1 unmatched: w"),
        ("off", ["folded"], 0, ""),
    ],
)
def test_fail_on_sets_the_exit_status(folder: Path, flag: str, fail_on: list[str], status: int, message: str) -> None:
    result = run("models_here:by_hand", "--dequant-at-load", flag, "--fail-on", *fail_on)
    assert result[0] == status
    found, _, names = result[2].strip().rpartition(": ")
    assert (found, set(names.split(", "))) == (
        (f"mxfp8-inspect: flag {flag}: {message.partition(': ')[0]}", set(message.partition(": ")[2].split(", ")))
        if message
        else ("", {""})
    )


def test_model_without_mxfp8_is_said_and_fails_only_on_demand(folder: Path) -> None:
    status, out, _ = run("models_here:no_mxfp8")
    assert status == 0
    assert "note: no MXFP8 weight" in out
    assert run("models_here:no_mxfp8", "--fail-on", "unmatched")[::2] == (
        1,
        "mxfp8-inspect: flag unset: no MXFP8 weight: swap linears with mxfp8_ops.quantize_(model)\n",
    )


def test_fail_on_with_passes_off_says_why_there_are_no_weights(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("MXFP8_PASSES", "off")
    status, _, err = run("models_here:two_layers", "--fail-on", "kept")
    assert status == 1
    assert "MXFP8_PASSES is off" in err


def test_json_has_a_run_for_each_flag_and_the_page_is_written(folder: Path) -> None:
    names = (folder / "1.json", folder / "1.html")
    status, out, err = run("single.py", "--dequant-at-load", "on", "off", "--json", names[0], "--html", names[1])
    assert (status, err) == (0, "")
    assert f"\nwrote {names[0]}\nwrote {names[1]}" in out
    assert names[1].read_text().startswith("<!doctype html>")
    assert [run["settings"]["dequant_at_load"] for run in json.loads(names[0].read_text())["runs"]] == ["on", "off"]


# --- targets -------------------------------------------------------------------------------------------------


def test_py_file_is_a_target_with_and_without_a_name(folder: Path) -> None:
    for target in ("single.py", folder / "single.py", folder / "models_here.py:by_hand"):
        status, out, err = run(target, "--weights", "*weight")
        assert (status, err) == (0, "")
        assert str(folder) not in out


def test_exported_program_is_a_target(folder: Path) -> None:
    program = torch.export.export(layer(), (torch.ones(4, 64, dtype=torch.bfloat16),))
    torch.export.save(program, "model.pt2")
    status, out, _ = run("model.pt2", "--dequant-at-load", "on")
    assert status == 0
    assert "== model.pt2: flag on" in out
    assert re.search(r"weight +48x64 +folded", out)


def save_llama(path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 80}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def test_checkpoint_folder_is_quantized_and_inspected(folder: Path) -> None:
    save_llama(folder / "llama")
    status, out, err = run("llama", "--dequant-at-load", "on", "--dtype", "bfloat16", "--weights", "*_proj*")
    assert (status, err) == (0, "")
    assert "8 of 8 linears were quantized to MXFP8 for this" in out
    assert re.search(r"model\.layers\.0\.mlp\.down_proj\.weight +64x96 +folded", out)
    assert "total: 7 weights" in out


@pytest.mark.skipif(targets.importlib.util.find_spec(targets.DEMO_PACKAGE) is None, reason="needs the demo's model")
def test_demo_is_a_target() -> None:
    target = targets.load("demo")
    assert target.title == "demo (all-MiniLM-L6-v2)"
    assert target.notes == ["37 of 37 linears were quantized to MXFP8 for this"]
    assert target.model(**target.kwargs).last_hidden_state.shape == (1, targets.TOKENS, 384)


# --- errors --------------------------------------------------------------------------------------------------


def unreadable_config(folder: Path) -> None:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    save_llama(folder / "checkpoint")
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"not safetensors")


def quantized(folder: Path) -> None:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text('{"quantization_config": {"quant_method": "modelopt"}}')


def bad_program(folder: Path) -> None:
    (folder / "bad.pt2").write_bytes(b"no zip")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["models_here:wrong_shape"], "ValueError: x must be [..., 64] for a weight of [96, 64], got [3, 5]"),
        (["bad:needs_an_argument"], "bad:needs_an_argument must take no arguments"),
        (["bad:raises"], "the factory raised RuntimeError: no such checkpoint"),
        (["bad:exits"], "the factory raised SystemExit: 0"),
        (["exits.py"], "cannot import exits.py: SystemExit: 3"),
        (["bad:three_things"], "must return (model, example_inputs), got a tuple of 3"),
        (["bad:no_model"], "the model must be a module or function, got int"),
        (["."], "is no transformers checkpoint: there is no config.json in it"),
        (["bad:not_a_pair"], "must return (model, example_inputs), got int"),
        (["bad:one_tensor"], "must be a tuple or a dict, got int"),
        (["bad:number"], "bad has no function number"),
        (["bad:absent"], "bad has no function absent"),
        (["absent:x"], "cannot import absent: ModuleNotFoundError"),
        (["broken:x"], "cannot import broken: ModuleNotFoundError: No module named 'not_a_module'"),
        (["broken.py"], "cannot import broken.py: ModuleNotFoundError: No module named 'not_a_module'"),
        (["bad.py"], "bad.py defines needs_an_argument, raises, exits, "),
        (["absent.py"], "there is no file absent.py"),
        (["absent.pt2"], "there is no file absent.pt2"),
        (["bad"], "expected module:factory, a .py or .pt2 file, a checkpoint folder or demo, got 'bad'"),
        (["models_here:two_layers", "--device", "cuda:99"], "no device 'cuda:99'"),
        (["models_here:two_layers", "--html", "."], "cannot write '.': Is a directory"),
        (["models_here:two_layers", "--device", "toaster"], "no device 'toaster'"),
        (
            ["models_here:two_layers", "--json", "absent/x.json"],
            "cannot write 'absent/x.json': No such file or directory",
        ),
    ],
)
def test_errors_are_one_line_and_status_2(folder: Path, args: list[str], message: str) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("mxfp8-inspect: ")
    assert message in err


@pytest.mark.parametrize(
    ("prepare", "target", "message"),
    [
        (unreadable_config, "checkpoint", "cannot read checkpoint as a transformers checkpoint: JSONDecodeError"),
        (no_weights, "checkpoint", "cannot load checkpoint: "),
        (quantized, "checkpoint", "checkpoint is quantized already (modelopt)"),
        (bad_program, "bad.pt2", "cannot read bad.pt2 as an exported program: it is no archive"),
    ],
)
def test_unreadable_files_are_one_line(
    folder: Path, prepare: Callable[[Path], None], target: str, message: str
) -> None:
    prepare(folder)
    status, out, err = run(target)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_bad_flag_in_the_environment_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "maybe")
    status, _, err = run("models_here:two_layers")
    assert status == 2
    assert err == (
        "mxfp8-inspect: ValueError: MXFP8_DEQUANT_AT_LOAD must be 1/true/yes/on or 0/false/no/off, got 'maybe'\n"
    )


def test_debug_shows_the_traceback_and_changes_nothing_else(folder: Path) -> None:
    status, _, err = run("bad:absent", "--debug")
    assert status == 2
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1] == "mxfp8-inspect: bad has no function absent"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--stage", "aot"],
        ["x", "--stage", "none"],
        ["x", "--fail-on", "lost"],
        ["x", "--unknown"],
        ["x", "--context", "-1"],
    ],
)
def test_wrong_usage_is_status_2(args: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2


def test_missing_rich_is_said_with_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lowering.inspect.terminal", None)
    monkeypatch.delattr("lowering.inspect.terminal", raising=False)
    assert "needs the package rich: pip install 'mxfp8-ops[inspect]'" in run("models_here:two_layers")[2]


def test_installed_command_is_this_program() -> None:
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="mxfp8-inspect")
    assert command.load() is cli.main
    assert mxfp8_ops.__version__ == command.dist.version  # type: ignore[union-attr]
