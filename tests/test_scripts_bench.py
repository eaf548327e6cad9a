"""``scripts/bench.py``: the whole run on the CPU with times that are made up, and what is made of times."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import benching
import pytest
import torch
from benching import US, FakeTimer
from helpers import assert_same
from programs import SCRIPTS

import mxfp8_ops

bench, fake = benching.bench, benching.fake

ARGUMENTS = ["--shapes", "64x64", "128x32", "32x64", "--rows", "1", "2", "64", "512", "--quick"]


# --- the whole flow ----------------------------------------------------------------------------------------


def test_a_run_prints_stores_and_describes_everything(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    assert bench.main([*ARGUMENTS, "--json", str(stored), "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    data, text = json.loads(stored.read_text()), page.read_text()

    assert [len(records) for records in data["sections"].values()] == [3, 12, 2, 2]
    assert data["environment"]["command"].endswith("--json run.json --markdown run.md")
    first, second, third = (data["sections"]["linear"][i] for i in (0, 1, 2))
    assert first["times"]["packed"] == {"us": 12.5, "spread": 4.0}
    assert first["ratios"]["packed"] == {"R": 1.25, "B": 0.625}
    assert first["ratios"]["R"] == {"R": 1.0, "B": 0.5}
    assert "emulated, compiled" in first["times"]
    assert "emulated" not in second["times"]
    assert all(1e-4 < error < 5e-3 for record in (first, third) for error in record["errors"].values())

    assert "[ 1/19] elementwise" in out
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
    for form in ("packed", "canonical"):
        assert f"{form}, 64 x 64, M = 1, 8, ..., 295: the largest ratio is 3.00, at M=15." in text
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


def test_linears_that_run_for_long_have_no_bars_but_clocks(
    bench: ModuleType, fake: FakeTimer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.sections"), "SUSTAINED_ROWS", (2, 4))
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    assert bench.main([*ARGUMENTS, "--sections", "sustained", "--json", str(stored), "--markdown", str(page)]) == 0
    records = json.loads(stored.read_text())["sections"]["sustained"]
    assert [(record["n"], record["k"], record["m"]) for record in records] == [
        (n, k, m) for n, k in ((64, 64), (128, 32), (32, 64)) for m in (2, 4)
    ]
    assert records[0]["times"]["packed"] == {"us": 24.0, "mhz": 1500, "watts": 690}
    assert records[0]["ratios"] == {"B": 1.0, "packed": 1.2, "canonical": 0.9}
    row = "| 64 x 64 | 2 | 1.20 B | 0.90 B | 20.00 | 24.00 | 18.00 | 1500 | 1500 | 1500 | 690 | 690 | 690 |"
    assert row in page.read_text()
    assert "!" not in page.read_text()


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


def test_only_a_run_that_is_not_quick_runs_for_long_and_counts_bytes(bench: ModuleType) -> None:
    everything, quick, explicit = (
        bench.selected(bench.parser().parse_args(words)).sections
        for words in ([], ["--quick"], ["--quick", "--sections", "bandwidth", "host"])
    )
    assert everything == (*quick, "sustained", "bandwidth")
    assert explicit == ("host", "bandwidth")
