"""``scripts/bench_model.py``: a small run on the CPU, what is made of results, and what is said of a bad call."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from programs import SCRIPTS, imported

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the package transformers"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("bench_model", monkeypatch) as module:
        yield module


# --- a run -----------------------------------------------------------------------------------------------------

TINY = ["--device", "cpu", "--tiny", "--layers", "1", "--batches", "1", "--prompt", "2", "--steps", "2"]


@needs_transformers
def test_a_tiny_run_on_the_cpu_agrees_with_the_dense_model(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    words = [*TINY, "--sections", "model", "--variants", "bf16", "folded"]
    assert bench.main([*words, "--json", str(stored), "--markdown", str(page)]) == 0, capsys.readouterr().out
    sections = json.loads(stored.read_text())["sections"]
    dense, folded = sections["model"]
    linears = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    head = 2 * 128 * 64
    assert dense["linear_bytes"] == 2 * linears + head
    assert folded["linear_bytes"] == 2 * linears + head  # scales are released, too
    assert dense["agreement"] is None
    assert folded["agreement"]["logits_difference"] <= 0.02 * folded["agreement"]["logits_largest"]
    assert folded["agreement"]["tokens"] == 3
    assert all(0 < record["ms"] < record["seconds"] * 1000 for record in (dense, folded))
    out, text = capsys.readouterr().out, page.read_text()
    assert "[1/2] model   bf16, batch 1: " in out
    assert "0 of 2 processes failed" in out
    assert "A tiny Llama with 1 layers" in text
    assert str(tmp_path) not in text + stored.read_text()


def test_a_process_that_fails_or_hangs_is_reported_and_the_others_go_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, tools = (importlib.import_module(f"benchmarks.{name}") for name in ("jobs", "tools"))
    record = {"linears": 64, "us": {"linears": 1.0, "folded": 2.0}, "check": 0.5, "difference": 1.5}
    record["seconds"] = 3.0
    ended = {
        "start": [(1, "USDT:x\nRuntimeError: no C++ compiler\nSet TORCH_LOGS for more\n"), (None, "")],
        "check": [(0, "")],
    }

    def run(command: list[str], limit: float, environment: dict[str, str]) -> Any:
        room, results = command[3], Path(command[-1])
        assert command[1:3] == ["-m", "benchmarks.worker"]
        assert environment["PYTHONPATH"].startswith(str(SCRIPTS))
        assert ("TRITON_CACHE_DIR" in environment) == (room == "start")
        if room == "check":
            results.write_text(json.dumps(["check", record]) + "\n")
        status, output = ended[room].pop(0)
        return tools.Finished(output, status, 1.0)

    monkeypatch.setattr(jobs.tools, "run", run)
    monkeypatch.setattr(bench.known, "NEED_TRANSFORMERS", ())
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    page = tmp_path / "run.md"
    words = ["--device", "cpu", "--tiny", "--sections", "start", "check", "--limit", "7", "--markdown", str(page)]
    assert bench.main(words) == 1
    out = capsys.readouterr().out
    assert "[1/3] start   cold failed: RuntimeError: no C++ compiler" in out
    assert "[2/3] start   warm failed: it took more than 7 s" in out
    assert "[3/3] check   0.50 of 1.50 us a linear (3 s)" in out
    assert "2 of 3 processes failed" in out
    assert "cold failed: RuntimeError: no C++ compiler" in page.read_text()


def test_every_variant_has_a_process_and_those_that_start_share_their_caches(bench: ModuleType, tmp_path: Path) -> None:
    jobs = importlib.import_module("benchmarks.jobs")
    planned = list(jobs.jobs(bench.known.ModelOptions(), tmp_path))
    assert [(job.room, job.name, job.count) for job in planned] == [
        ("blocks", "blocks", 8),
        ("merge", "merge", 2),
        ("decoding", "bf16", 2),
        ("decoding", "kept", 3),
        ("decoding", "folded", 2),
        ("decoding", "emulation", 3),
        ("start", "cold", 1),
        ("start", "warm", 1),
        *(("peak", way, 1) for way in ("folded", "frozen", "packed")),
        ("check", "check", 1),
    ]
    cold, warm = (job for job in planned if job.room == "start")
    assert cold.environment == warm.environment
    traced = bench.known.ModelOptions(sections=("trace",), variants=("bf16", "kept"))
    assert [(job.name, job.sections) for job in jobs.jobs(traced, tmp_path)] == [("kept", ("trace",))]


# --- a stored run ----------------------------------------------------------------------------------------------

AGREEMENT = {"logits_difference": 0.031, "logits_largest": 6.5, "first_token": 1.0, "same_tokens": 90.5, "tokens": 129}
BLOCK = {"bf16": 9.0, "folded": 9.1, "kept": 6.0, "eager packed": 6.25}
MODEL = {"batch": 1, "ms": 4.0, "tokens_per_s": 250.0, "linear_bytes": 7.5e9, "compile_s": 30.0, "cudagraph_skips": 0}
START = {"fx_misses": 0, "aot_hits": 1, "aot_misses": 0, "aot_bypasses": 0, "compile_s": 4.0, "triton_files": 0}
KERNELS = [{"name": "triton_red_fused", "count": 65, "us": 120.0}]
RUN: dict[str, Any] = {
    "format": 1,
    "environment": {
        **{"device": "Some GPU", "torch": "2.11", "triton": "3.6", "transformers": "5.23", "cuda": "13.0"},
        **{"clocks": {"sm": 1980, "sm_max": 1980}, "switches": {}, "date": "today", "command": "python x.py"},
    },
    "options": {
        "layers": 32,
        "prompt": 64,
        "steps": 128,
        "repeats": 3,
        "quantize_head": False,
        "tiny": False,
        "device": "cuda",
    },
    "sections": {
        "blocks": [
            {"mode": "reduce-overhead", "m": 1, "us": BLOCK, "cudagraph_skips": 2, "seconds": 20.0},
            {"mode": "default", "m": 1, "us": BLOCK | {"kept": 30.0}, "cudagraph_skips": 0, "seconds": 20.0},
        ],
        "merge": [
            {"m": 16, "us": {"apart": 80.0, "merged": 75.5}, "error": 0.004, "seconds": 9.0}
            | {"error of one block": 0.001, "cudagraph_skips": 0}
        ],
        "model": [
            {"variant": "bf16", "agreement": None, "allocated": 2e10, "peak": 2.1e10, "seconds": 50.0} | MODEL,
            {"variant": "kept", "agreement": AGREEMENT, "allocated": 1e10, "peak": 1.1e10, "seconds": 50.0} | MODEL,
            {"failed": "it took more than 180 s", "job": "emulation"},
        ],
        "trace": [
            {"variant": "kept", "batch": 1, "kernels": 400, "us": 3900.0, "span": 4000.0, "gaps": 100.0, "copies": 0}
            | {"top": KERNELS, "seconds": 60.0}
        ],
        "start": [{"run": "warm", "fx_hits": 1, "build_s": 1.0, "seconds": 14.0} | START],
        "peak": [
            {"way": "folded", "quantized": 1.1e9, "bf16": 2 << 30, "peak": (2 << 30) + (64 << 20), "after": 2 << 30}
            | {"layer": 32 << 20, "seconds": 15.0}
        ],
        "check": [],
    },
}


def test_a_stored_run_is_shown_section_by_section(bench: ModuleType, tmp_path: Path) -> None:
    stored = tmp_path / "run.json"
    stored.write_text(json.dumps(RUN))
    script = [sys.executable, str(SCRIPTS / "bench_model.py"), "--from-json", str(stored)]
    text = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60).stdout
    assert text.startswith(
        "# Some GPU, compiled models\n\ntorch 2.11, triton 3.6, transformers 5.23, SM clock 1980 MHz under load, today"
    )
    assert "| reduce-overhead | 1 | 9.00 | 9.10 | 6.00 | 6.25 |" in text
    assert "In mode reduce-overhead, kept takes at most 0.96 of eager packed." in text
    assert "In mode default, kept takes at most 4.80 of eager packed." in text
    assert text.count("Graphs that Inductor would not make CUDA graphs of") == 1
    assert "| 16 | 80.0 | 75.5 | 4.0e-03 | 1.0e-03 |" in text
    assert "| bf16 | 1 | 250.0 | 4.000 | 7.500 | 20.000 | 21.000 |  |  |  | 30.0 |" in text
    assert "| kept | 1 | 250.0 | 4.000 | 7.500 | 10.000 | 11.000 | 0.031 | 6.5 | 90.5 of 129 | 30.0 |" in text
    assert "\n\nemulation failed: it took more than 180 s\n" in text
    assert "400 kernels, 3900 us in all, 4000 us from first to last,\n100 us of gaps, large copies: 0\n" in text
    assert "| `triton_red_fused` | 65 | 120.0 |" in text
    assert "| warm | 14.0 | 4.0 | 1 | 0 | 1 | 0 | 0 | 0 |" in text
    assert "| folded | 1100 | 2215 | 2147 | 2.0 | 2.0 |" in text
    assert "stale" not in text


def later(tmp_path: Path, name: str, sections: dict[str, Any], **environment: str) -> Path:
    path = tmp_path / f"{name}.json"
    found = RUN["environment"] | {"command": f"python {name}.py", "date": "later"} | environment
    path.write_text(json.dumps(RUN | {"sections": sections, "environment": found}))
    return path


def test_of_several_stored_runs_every_record_is_the_latest_and_the_page_says_whose(
    bench: ModuleType, tmp_path: Path
) -> None:
    kept, emulation = ({"variant": name, "agreement": None, "seconds": 5.0} | MODEL for name in ("kept", "emulation"))
    first = tmp_path / "first.json"
    first.write_text(json.dumps(RUN))
    second = later(tmp_path, "second", {"model": [kept | {"ms": 3.0}, emulation | {"ms": 9.0}], "trace": []})
    third = later(tmp_path, "third", {"merge": [RUN["sections"]["merge"][0] | {"error": 0.5}]})
    joined, page = tmp_path / "joined.json", tmp_path / "page.md"
    two = bench.main(["--from-json", str(first), str(second), "--json", str(joined)])
    three = bench.main(["--from-json", str(joined), str(third), "--markdown", str(page)])
    assert (two, three) == (0, 0)
    text = page.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| bf16", "| kept", "| emul", "| 16 "))]
    assert [row[0] for row in rows] == ["| 16", "| bf16", "| kept", "| emulation"]
    assert [row[3] for row in rows] == ["5.0e-01", "4.000", "3.000", "9.000"]
    assert "failed" not in text
    assert re.findall("Measured by .*", text) == [
        "Measured by `python third.py` (later).",
        "Measured by `python x.py` (today), and by `python second.py` (later).",
    ]
    once = bench.stored_runs.load([first], bench.known.SECTIONS)
    assert (once["sections"], once["sources"]) == (RUN["sections"], {})


def test_a_run_that_only_failed_is_not_named_after_one_that_did_not(bench: ModuleType, tmp_path: Path) -> None:
    (failure,) = (record for record in RUN["sections"]["model"] if "failed" in record)
    runs = [later(tmp_path, "first", {"model": [failure]})]
    failed = bench.stored_runs.load(runs, bench.known.SECTIONS)
    assert (failed["sections"], failed["sources"]) == ({"model": [failure]}, {})
    runs.append(later(tmp_path, "second", {"model": [{"variant": "kept", "agreement": None, "seconds": 5.0} | MODEL]}))
    run = bench.stored_runs.load(runs, bench.known.SECTIONS)
    assert [record["variant"] for record in run["sections"]["model"]] == ["kept"]
    assert [each["command"] for each in run["sources"]["model"]] == ["python second.py"]


def test_runs_of_different_machines_do_not_share_a_page(bench: ModuleType, tmp_path: Path, capsys: Any) -> None:
    paths = [later(tmp_path, "here", {"model": []}), later(tmp_path, "there", {"model": []}, device="Another GPU")]
    assert bench.main(["--from-json", *map(str, paths)]) == 2
    reason = f"{paths[1]} cannot stand on one page with the run before it: device Another GPU instead of Some GPU"
    assert capsys.readouterr().err == f"bench_model: {reason}\n"


def test_every_record_is_one_line(bench: ModuleType) -> None:
    lines = importlib.import_module("benchmarks.model_lines")
    shown = [lines.line(section, record) for section, records in RUN["sections"].items() for record in records]
    assert all("\n" not in line for line in shown)
    assert "model   emulation failed: it took more than 180 s" in shown
    assert "trace   kept: 400 kernels, 3900 us, gaps 100 us, large copies: 0 (60 s)" in shown
    assert "peak    folded: peak 2.0 layers above bf16 (15 s)" in shown


# --- a bad call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--tiny", "--sections", "blocks", "check"], "the sections blocks need a CUDA device"),
        (["--json", "missing/run.json"], "missing/run.json cannot be written: there is no folder missing"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_status_2(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert bench.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"bench_model: {message}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_is_one_line_and_status_2(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--sections", "blocks"]) == 2
    assert capsys.readouterr().err == "bench_model: there is no CUDA device\n"


def test_without_transformers_the_sections_that_need_it_are_named(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--device", "cpu", "--tiny"]) == 2
    message = "the package transformers is not installed, which the sections model, start need"
    assert capsys.readouterr().err == f"bench_model: {message}\n"


def test_a_run_of_the_other_benchmark_is_refused(bench: ModuleType, tmp_path: Path, capsys: Any) -> None:
    stored = tmp_path / "run.json"
    stored.write_text(json.dumps({"format": 1, "sections": {"elementwise": [], "linear": []}}))
    assert bench.main(["--from-json", str(stored)]) == 2
    assert "is a run of another benchmark, with the sections elementwise, linear" in capsys.readouterr().err


# --- what is made of results -----------------------------------------------------------------------------------


def event(name: str, start: float, length: float, category: str = "kernel", **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": arguments}


def test_a_trace_is_summed_by_kernel_and_copies_of_weights_are_counted(bench: ModuleType) -> None:
    trace = importlib.import_module("benchmarks.trace")
    events = [
        event("void gemm<float, 4>(float*)", 10.0, 5.0, grid=[512, 1, 1], block=[256, 1, 1]),
        event("void gemm<bfloat16, 4>(int)", 20.0, 5.0),
        event("kernel", 24.0, 3.0),  # begins before the other one ends
        event("Memcpy DtoD (Device -> Device)", 30.0, 8.0, "gpu_memcpy", bytes=33554432),
        event("Memcpy DtoD (Device -> Device)", 40.0, 1.0, "gpu_memcpy", bytes=8),
        event("triton_poi_fused_clone_3", 45.0, 2.0, grid=[4096, 1, 1], block=[128, 1, 1]),
        event("triton_poi_fused__to_copy_1", 47.0, 1.0, grid=[16, 1, 1], block=[128, 1, 1]),
        event("aten::copy_", 0.0, 100.0, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]
    found = trace.summary(events)
    assert (found["kernels"], found["us"], found["span"], found["gaps"], found["copies"]) == (7, 25.0, 38.0, 14.0, 2)
    assert found["top"][:2] == [
        {"name": "gemm", "count": 2, "us": 10.0},
        {"name": "Memcpy DtoD (Device -> Device)", "count": 2, "us": 9.0},
    ]
    assert trace.summary([])["span"] == 0.0


@needs_transformers
def test_agreement_counts_tokens_up_to_the_first_that_differs(bench: ModuleType, tmp_path: Path) -> None:
    decoding = importlib.import_module("benchmarks.decoding")
    path = tmp_path / "reference.pt"
    logits, tokens = torch.tensor([[1.0, -4.0], [2.0, 3.0]]), torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    other = decoding.Result([0.1], logits + 0.5, torch.tensor([[5, 6, 0, 8], [1, 2, 3, 4]]))
    assert decoding.compare(other, "kept", path) is None
    assert decoding.compare(decoding.Result([0.1], logits, tokens), "bf16", path) is None
    found = decoding.compare(other, "kept", path)
    assert found == {
        **{"logits_difference": 0.5, "logits_largest": 4.0, "first_token": 1.0, "same_tokens": 3.0, "tokens": 4}
    }
    assert decoding.timing(decoding.Result([0.004, 0.002, 0.009], logits, tokens), 16) == {
        **{"ms": 4.0, "ms_range": [2.0, 9.0], "tokens_per_s": 4000.0}
    }


def test_the_check_for_stale_weights_takes_part_of_what_a_folded_linear_takes_more(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, page = (importlib.import_module(f"benchmarks.{name}") for name in ("check", "model_page"))
    monkeypatch.setattr(check, "CHECKED", 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with torch.no_grad():
        ((section, record),) = check.records(bench.known.ModelOptions(device="cpu", rounds=2))
    assert (section, record["linears"], record["us"].keys()) == ("check", 4, {"linears", "folded"})
    assert 0 < record["check"] < 100
    text = page.markdown(RUN | {"sections": {"check": [record]}})
    assert "## The check for stale weights\n\n4 tiny linears on the CPU" in text


def test_the_difference_is_that_of_a_linear(bench: ModuleType) -> None:
    check = importlib.import_module("benchmarks.check")
    assert check.difference({"linears": [100.0, 110.0, 100.0], "folded": [164.0, 238.0, 132.0]}) == 1.0


def test_the_emulation_computes_what_a_kept_weight_does(bench: ModuleType) -> None:
    import mxfp8_ops

    compiled = importlib.import_module("benchmarks.compiled")
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32, bias=False), torch.nn.ReLU(), torch.nn.Linear(32, 32, bias=False)
    )
    mxfp8_ops.quantize_(model)
    x = torch.randn(3, 64)
    expected = model(x)
    compiled.emulate_(model)
    assert [type(layer).__name__ for layer in model] == ["EmulatedLinear", "ReLU", "EmulatedLinear"]
    torch.testing.assert_close(model(x), expected)


def test_columns_take_turns(bench: ModuleType) -> None:
    compiled = importlib.import_module("benchmarks.compiled")
    calls = SimpleNamespace(made="")

    def call(name: str) -> None:
        calls.made += name

    times = compiled.host_times({name: lambda name=name: call(name) for name in "ab"}, rounds=2, calls=3)
    assert calls.made == "aaaabbbb" + "aaabbb" * 2
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2}
    assert compiled.medians({"a": [1.0, 9.0, 4.0]}, 2) == {"a": 2.0}
