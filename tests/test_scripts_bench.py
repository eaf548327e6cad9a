"""``scripts/bench.py``: the whole run on the CPU with times that are made up, and what is made of times."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same
from programs import SCRIPTS, imported

import mxfp8_ops

US = {
    "R": [10.0, 10.0, 10.0],
    "B": [20.0, 20.0, 20.0],
    "packed": [12.5, 12.0, 13.0],
    "canonical": [10.5, 10.5, 10.5],
    "folded": [20.2, 20.2, 20.2],
    "emulated": [400.0, 400.0, 400.0],
    "emulated, compiled": [100.0, 100.0, 100.0],
    "copy": [9.0, 9.0, 9.0],
    "dequant to bfloat16": [10.0, 10.0, 10.0],
    "dequant to float16": [9.0, 9.0, 9.0],
    "quantize from bfloat16": [10.0, 10.0, 10.0],
}
"""Microseconds of each column in three rounds."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("bench", monkeypatch) as module:
        yield module


class FakeTimer:
    """Calls everything once; the times come from ``US``, those of cliffs from ``cliff``."""

    def __init__(self) -> None:
        self.calls = 0

    def interleaved(self, columns: Mapping[str, Any], replays: int) -> dict[str, list[float]]:
        for calls in columns.values():
            for call in calls:
                call()
                self.calls += 1
        return {name: self.cliff(int(name)) if name.isdecimal() else US[name] for name in columns}

    def host(self, calls: Mapping[str, Any]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 10.0 + i for i, name in enumerate(calls)}

    @staticmethod
    def cliff(m: int) -> list[float]:
        return [30.0 if m == 15 else 10.0] * 3


@pytest.fixture
def fake(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeTimer:
    """In place of the CUDA device one on the CPU that does not time. Gives its timer."""
    bars, devices, sections = (
        importlib.import_module(f"benchmarks.{name}") for name in ("bars", "devices", "sections")
    )
    timer = FakeTimer()

    class Fake(devices.Device):
        place = "cpu"
        rotated_bytes = 1
        read_configurations = ("R",)

        @classmethod
        def open(cls) -> Fake:
            return cls(timer)

        @classmethod
        def missing(cls) -> None:
            return None

        def environment(self) -> dict[str, Any]:
            clocks = {"sm": 1500, "sm_max": 1980}
            versions = {"torch": "2.11", "triton": "3.6", "cuda": "13.0"}
            return {"device": "Fake GPU", **versions, "clocks": clocks, "switches": {"MXFP8_AUTOTUNE": "1"}}

        def read(self, words: torch.Tensor, configuration: str) -> None:
            words.sum()

        def compile(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return function

        def release(self) -> None:
            pass

    monkeypatch.setitem(devices.DEVICES, "cuda", Fake)
    monkeypatch.setattr(bars, "SHAPES", ((64, 64), (128, 32), (32, 64)))  # so that bars apply to them
    monkeypatch.setattr(bars, "WITHOUT_BARS", (32, 64))
    monkeypatch.setattr(bars, "SMALL", (128, 32))
    monkeypatch.setattr(sections, "HOST_SHAPE", (64, 64))
    return timer


ARGUMENTS = ["--shapes", "64x64", "128x32", "32x64", "--rows", "1", "2", "64", "512", "--quick"]


# --- the whole flow ----------------------------------------------------------------------------------------


def test_a_run_prints_stores_and_describes_everything(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    assert bench.main([*ARGUMENTS, "--json", str(stored), "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    data, text = json.loads(stored.read_text()), page.read_text()

    assert [len(records) for records in data["sections"].values()] == [3, 12, 2, 1]
    assert data["environment"]["command"].endswith("--json run.json --markdown run.md")
    first, second, third = (data["sections"]["linear"][i] for i in (0, 1, 2))
    assert first["times"]["packed"] == {"us": 12.5, "spread": 4.0}
    assert first["ratios"]["packed"] == {"R": 1.25, "B": 0.625}
    assert first["ratios"]["R"] == {"R": 1.0, "B": 0.5}
    assert "emulated, compiled" in first["times"]
    assert "emulated" not in second["times"]
    assert all(1e-4 < error < 5e-3 for record in (first, third) for error in record["errors"].values())

    assert "[ 1/18] elementwise" in out
    assert "64x64        M=1     packed 1.25 R!  canonical 1.05 R  folded 1.01 B  emulated 20.00 B" in out
    assert "M=15 (3.00)" in out
    assert "5 of 24 bars missed" in out

    assert text.startswith(
        "# Fake GPU\n\ntorch 2.11, triton 3.6, CUDA 13.0, SM clock 1500 MHz under load, at most 1980"
    )
    assert "MXFP8_AUTOTUNE=1" in text
    assert str(tmp_path) not in text + stored.read_text()
    assert "5 of 24 bars missed, marked with `!`:" in text
    assert "- dequant to bfloat16, 64x64: 90% of a copy, at least 92%" in text
    assert "- packed, 64x64, M=1: 1.25 R, at most 1.06 R" in text
    assert "| 64 x 64 | 90%! | 100% | 90% | 9.00 | 10.00 | 9.00 | 10.00 | 0.0% |" in text
    assert "| 32 x 64 | 90% |" in text  # has no bars
    assert "| 1 | 1.25 R!, 0.62 B | 1.25 R!, 0.62 B | 1.25 R, 0.62 B |" in text
    assert "| 2 | 1.25 R!, 0.62 B | 1.25 R, 0.62 B | 1.25 R, 0.62 B |" in text  # the small shape has another bar
    assert "| 512 | 0.62 B | 0.62 B | 0.62 B |" in text
    assert "| `no_grad` | 10.0 | 11.0 | 12.0 | 13.0 |" in text
    assert "64 x 64, M = 1, 8, ..., 295: the largest ratio is 3.00, at M=15." in text
    assert "| 15 | 3.00 | 30.00 | 10.00 | 10.00 |" in text


def test_every_column_computes_the_same_linear(bench: ModuleType, fake: FakeTimer) -> None:
    devices, sections = (importlib.import_module(f"benchmarks.{name}") for name in ("devices", "sections"))
    weight = devices.DEVICES["cuda"].open().weight((32, 64), torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    columns = sections._multiplications([weight], x)
    expected = mxfp8_ops.linear(x, *weight.canonical)
    for name in ("packed", "canonical", "folded"):
        assert_same(columns[name][0](), expected)
    assert_same(sections.emulated_linear(x, *weight.canonical), expected)
    assert_same(columns["B"][0](), torch.nn.functional.linear(x, weight.dense))


def test_a_stored_run_gives_the_same_page_without_a_device(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    assert bench.main([*ARGUMENTS, "--json", str(stored), "--markdown", str(page)]) == 0
    capsys.readouterr()
    assert bench.main(["--from-json", str(stored)]) == 0
    text = capsys.readouterr().out
    script = [sys.executable, str(SCRIPTS / "bench.py"), "--from-json", str(stored)]
    printed = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60).stdout
    # Another process has the project's own shapes, of which these are none.
    assert "No bar of the project applies to these shapes." in printed
    assert "!" not in printed
    assert text == page.read_text()


def test_a_killed_run_keeps_its_results_and_can_be_shown(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "run.json"
    monkeypatch.setattr(fake, "host", lambda calls: (_ for _ in ()).throw(KeyboardInterrupt))
    assert bench.main([*ARGUMENTS, "--json", str(stored)]) == 130
    assert f"bench: stopped; {stored} has the results until now" in capsys.readouterr().err
    assert bench.main(["--from-json", str(stored)]) == 0
    out = capsys.readouterr().out
    assert "### `linear_packed`" in out
    assert "## Time of the host" not in out
    assert list(tmp_path.iterdir()) == [stored]


def test_sections_and_emulation_can_be_left_out(bench: ModuleType, fake: FakeTimer, tmp_path: Path) -> None:
    stored = tmp_path / "run.json"
    assert bench.main([*ARGUMENTS, "--sections", "linear", "--no-emulation", f"--json={stored}"]) == 0
    data = json.loads(stored.read_text())
    assert list(data["sections"]) == ["linear"]
    assert all(set(record["times"]) == set(list(US)[:5]) for record in data["sections"]["linear"])
    assert data["environment"]["command"].endswith("--json=run.json")


def test_float16_is_measured_in_float16(bench: ModuleType, fake: FakeTimer, tmp_path: Path) -> None:
    stored = tmp_path / "run.json"
    assert bench.main([*ARGUMENTS, "--dtype", "float16", "--sections", "linear", f"--json={stored}"]) == 0
    errors = [record["errors"]["packed"] for record in json.loads(stored.read_text())["sections"]["linear"]]
    assert max(errors) < 5e-4  # bfloat16 has some 1.7e-3


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the package matplotlib")
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_plot_has_a_panel_for_each_of_six_shapes(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, count: int
) -> None:
    picture, stored = tmp_path / "run.png", tmp_path / "run.json"
    shapes = ["64x64", "128x32", "32x64", "32x32", "64x32", "128x64", "32x96"][:count]
    files = ["--json", str(stored), "--plot", str(picture)]
    assert bench.main(["--rows", "64", "1", "--sections", "linear", "--shapes", *shapes, *files]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    figure = bench.plot.draw(json.loads(stored.read_text()))
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == [shape.replace("x", " x ") for shape in shapes[:6]]
    for panel in panels:
        lines = {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
        assert lines["packed"] == [[1, 0.625], [64, 0.625]]
        assert lines["canonical"] == [[1, 0.525], [64, 0.525]]
        assert lines["folded"] == [[1, 1.01], [64, 1.01]]
        assert lines["R: only reading the packed weight"] == [[1, 0.5], [64, 0.5]]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4


def test_on_a_terminal_results_stay_above_the_bar(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    progress = importlib.import_module("benchmarks.progress")
    with progress.RichReporter(2) as results:
        results.start("linear")
        results.result("M=1 [1.25 R]")
    assert "M=1 [1.25 R]\n" in capsys.readouterr().out


# --- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--shapes", "4096"], "a shape is NxK, such as 4096x4096, got '4096'"),
        (["--shapes", "0x64"], "a shape is NxK, such as 4096x4096, got '0x64'"),
        (["--shapes", "64x33"], "K must be a multiple of the block size 32, got '64x33'"),
        (["--rows", "0"], "a number of rows is a positive integer, got '0'"),
        (["--rows", "-1"], "a number of rows is a positive integer, got '-1'"),
        (["--dtype", "float32"], "invalid choice: 'float32'"),
        (["--sections", "gemm"], "invalid choice: 'gemm'"),
    ],
)
def test_bad_arguments_are_named(bench: ModuleType, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_used_are_one_line_before_anything_is_measured(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other, text, empty = (tmp_path / name for name in ("other.json", "text.json", "empty.json"))
    other.write_text("[]")
    text.write_text("no")
    missing = tmp_path / "missing" / "run.json"
    picture = str(tmp_path / "run.png")
    find = importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name == "matplotlib" or find(name))
    assert bench.main(["--sections", "host", "--json", str(empty)]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["--json", str(missing)], f"{missing} cannot be written: there is no folder {missing.parent}"),
        (["--from-json", str(missing)], "No such file"),
        (["--from-json", str(text)], f"{text} is not JSON"),
        (["--from-json", str(other)], f"{other} is not a run of this benchmark (format 1)"),
        (["--sections", "host", "--plot", picture], "--plot draws the section linear"),
        (["--from-json", str(empty), "--plot", picture], "has no results of the section linear"),
    ):
        assert bench.main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("bench: ")
        assert message in err
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--plot", picture]) == 2
    assert "--plot needs the package matplotlib; a run stored with --json can be plotted elsewhere" in (
        capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_is_one_line_and_status_2(tmp_path: Path) -> None:
    script = [sys.executable, str(SCRIPTS / "bench.py"), "--json", "run.json"]
    result = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "bench: there is no CUDA device\n")
    assert not list(tmp_path.iterdir())


def test_quick_yields_to_what_is_said_explicitly(bench: ModuleType) -> None:
    options = bench.selected(bench.parser().parse_args(["--quick"]))
    assert options.shapes == ((4096, 4096), (28672, 8192))
    assert (options.emulated, options.replays, options.cliff_rows[:2]) == ((1,), 7, (1, 8))
    options = bench.selected(bench.parser().parse_args(["--quick", "--rows", "64", "7", "64", "--shapes", "32x64"]))
    assert (options.shapes, options.rows, options.emulated) == (((32, 64),), (64, 7), ())
    options = bench.selected(bench.parser().parse_args([]))
    assert (len(options.shapes), options.rows[-1], options.replays, len(options.cliff_rows)) == (7, 8192, 11, 300)


def test_only_a_run_that_is_not_quick_counts_bytes(bench: ModuleType) -> None:
    everything, quick, explicit = (
        bench.selected(bench.parser().parse_args(words)).sections
        for words in ([], ["--quick"], ["--quick", "--sections", "bandwidth", "host"])
    )
    assert everything == (*quick, "bandwidth")
    assert explicit == ("host", "bandwidth")


# --- bandwidth ---------------------------------------------------------------------------------------------

NAMES = ("ID", "Process ID", "Process Name", "Kernel Name", "Block Size", "CC")
METRICS = (
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
)


def ncu_table(units: tuple[str, str, str], *launches: tuple[str, str, str, str]) -> str:
    """What ``ncu --csv --page raw`` prints of launches: the kernel's name, then a value for each of ``METRICS``."""

    def line(*cells: str) -> str:
        return ",".join(f'"{cell}"' for cell in cells)

    head = ["==PROF== Connected to process 71 (/usr/bin/python3.12)"]
    head += [f'==PROF== Profiling "{name}" - 0: 0%....50%....100% - 2 passes' for name, *_ in launches]
    rows = [
        line(str(i), "71", "python3.12", name, "(256, 1, 1)", "9.0", *values)
        for i, (name, *values) in enumerate(launches)
    ]
    table = [line(*NAMES, *METRICS), line(*[""] * len(NAMES), *units), *rows]
    return "\n".join([*head, "==PROF== Disconnected from process 71", *table]) + "\n"


R = ("read_kernel", "16,908,288", "80.25", "5,216")
ONE_SHAPE = ncu_table(
    ("byte", "%", "ns"),
    *(R, ("kernel", "17,301,504", "60.5", "8,000")),
    *(R, ("kernel", "17,301,504", "75.5", "6,400")),
    *(R, ("kernel", "17,301,504", "50.5", "9,000"), ("add_parts", "131,072", "1.5", "2,500")),
    *(R, ("kernel", "17,432,576", "49.5", "10,000")),
)
"""Of a shape's calls on both forms of the weight with 1 row and with 16."""


def counted(monkeypatch: pytest.MonkeyPatch, folder: Path, output: str, status: int = 0) -> None:
    """In place of ncu a program that prints this."""
    (folder / "output").write_text(output)
    ncu = folder / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {folder}/arguments\ncat {folder}/output\nexit {status}\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_bandwidth_is_that_of_every_kernel_of_a_call(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted(monkeypatch, tmp_path, ONE_SHAPE)
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    words = ["--shapes", "4096x4096", "--sections", "bandwidth", "--json", str(stored), "--markdown", str(page)]
    assert bench.main(words) == 0
    one, sixteen = json.loads(stored.read_text())["sections"]["bandwidth"]
    assert [(each["n"], each["k"], each["m"]) for each in (one, sixteen)] == [(4096, 4096, 1), (4096, 4096, 16)]
    assert {name: [each["kernel"] for each in launched] for name, launched in sixteen["calls"].items()} == {
        "R": ["read_kernel"],
        "linear_packed": ["kernel", "add_parts"],
        "linear": ["kernel"],
    }
    assert one["calls"]["linear"] == [
        {"kernel": "kernel", "us": 6.4, "bytes": 17301504, "gbs": 2703.4, "percent": 75.5}
    ]
    assert "[1/2] bandwidth   4096x4096    M=1     R 3242 GB/s (80%)  linear_packed 2163 GB/s (60%)" in (
        capsys.readouterr().out
    )
    text = page.read_text()
    assert "## Bandwidth" in text
    assert "| 4096 x 4096 | 16 | linear_packed | `add_parts` | 2.50 | 0.13 | 52 | 2% |" in text
    arguments = (tmp_path / "arguments").read_text()
    assert "--profile-from-start off --cache-control all --clock-control none" in arguments
    assert arguments.endswith("-m benchmarks.profiled bfloat16 4096x4096\n")


def test_what_is_profiled_is_each_call_after_r(bench: ModuleType, fake: FakeTimer, monkeypatch) -> None:
    bandwidth, devices, profiled = (
        importlib.import_module(f"benchmarks.{name}") for name in ("bandwidth", "devices", "profiled")
    )
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "profiler", SimpleNamespace(start=done.clear, stop=lambda: found.extend(done)))
    monkeypatch.setattr(devices.DEVICES["cuda"], "read", lambda *_: done.append("R"))
    for name, function in list(profiled.FUNCTIONS.items()):
        changed = lambda w, x, name=name, f=function: (done.append(f"{name} M={len(x)}"), f(w, x))  # noqa: E731
        monkeypatch.setitem(profiled.FUNCTIONS, name, changed)
    found: list[str] = []
    profiled.main(["bfloat16", "64x64", "32x64"])
    once = [each for m in (1, 16) for name in bandwidth.CALLS for each in ("R", f"{name} M={m}")]
    assert found == once * 2


@pytest.mark.parametrize(
    ("units", "read", "time"),
    [
        (("byte", "%", "nsecond"), "17,301,504", "8,000"),
        (("Kbyte", "%", "ns"), "17,301.504", "8,000"),
        (("Mbyte", "%", "us"), "17.301504", "8"),
        (("Mbyte", "%", "usecond"), "17.301504", "8.00"),
        (("Gbyte", "%", "ms"), "0.017301504", "0.008"),
        (("Gbyte", "%", "msecond"), "0.017301504", "0.008"),
    ],
)
def test_bandwidth_does_not_depend_on_the_units_of_the_table(
    bench: ModuleType, units: tuple[str, str, str], read: str, time: str
) -> None:
    bandwidth = importlib.import_module("benchmarks.bandwidth")
    (kernel,) = bandwidth.kernels(ncu_table(units, ("kernel", read, "60.5", time)))
    assert kernel == {"kernel": "kernel", "us": 8.0, "bytes": 17301504, "gbs": 2162.7, "percent": 60.5}


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\nbye\n", "0 of 4 calls (==ERROR== ERR_NVGPUCTRPERM - no permis"),
        (ncu_table(("byte", "%", "ns"), R), "ncu profiled 1 of 4 calls"),
        (ncu_table(("sector", "%", "ns"), R), "ncu gives dram__bytes_read.sum in the unit 'sector'"),
        (ncu_table(("byte", "%", "ns"), ("read_kernel", "n/a", "n/a", "1")), "could not convert string to float"),
        ("", "ncu profiled 0 of 4 calls"),
    ],
)
def test_without_counters_the_section_says_why(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, monkeypatch, capsys, output: str, reason: str
) -> None:
    counted(monkeypatch, tmp_path, output, status=1)
    page = tmp_path / "run.md"
    assert bench.main(["--shapes", "64x64", "--sections", "bandwidth", "--markdown", str(page)]) == 0
    assert reason in capsys.readouterr().out
    assert "## Bandwidth\n\nSkipped: " in page.read_text()


def test_without_nsight_compute_the_section_is_skipped(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.import_module("benchmarks.tools"), "TOOLKIT", str(tmp_path))
    assert bench.main(["--sections", "bandwidth"]) == 0
    assert f"bandwidth   skipped: there is no ncu on PATH or in {tmp_path}" in capsys.readouterr().out
