"""``scripts/bench.py --device cpu``: the whole run with times that are made up, on kernels that compute."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same
from programs import imported

import mxfp8_ops
from mxfp8_ops.cpu import library

US = {
    "R": 100.0,
    "B": 500.0,
    "canonical": 130.0,
    "folded": 505.0,
    "compiled": 131.0,
    "backend": 140.0,
    "emulated": 9000.0,
    "emulated, compiled": 5000.0,
    "torchao": 250.0,
    "copy": 100.0,
    "copy of dense": 264.0,
    "copy of quantized": 132.0,
    "dequant to bfloat16": 220.0,
    "dequant to float16": 250.0,
    "quantize from bfloat16": 400.0,
    "dequant alone": 111.0,
    "quantize alone": 140.0,
}
ARGUMENTS = ["--device", "cpu", "--shapes", "64x64", "96x32", "--m", "1", "16", "64"]


class FakeTimer:
    """Calls everything once; the times come from ``US``."""

    def interleaved(self, columns: Mapping[str, Any], replays: int) -> dict[str, list[float]]:
        for calls in columns.values():
            for call in calls:
                call()
        return {name: [US.get(name, US["R"])] * replays for name in columns}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("bench", monkeypatch) as module:
        yield module


def room(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def fake(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU without time: nothing is compiled, and there are three weights of every shape. The level is the best."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name, value in (("rotated_bytes", 1), ("open", classmethod(lambda cls: cls(FakeTimer())))):
        monkeypatch.setattr(room("devices").Cpu, name, value)
    monkeypatch.setattr(room("devices"), "cpu_level", lambda: "avx512_bf16")
    monkeypatch.setattr(room("processor"), "model", lambda: "Fake CPU")
    monkeypatch.setattr(room("processor"), "caches", lambda: {"L1": 32 << 10, "L3": 8 << 20})
    monkeypatch.setattr(room("bars"), "CPU_SHAPES", ((64, 64),))


# --- the whole flow ----------------------------------------------------------------------------------------


def test_a_run_prints_stores_and_describes_everything(
    bench: ModuleType, fake: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    assert bench.main([*ARGUMENTS, "--json", str(stored), "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    data, text = json.loads(stored.read_text()), page.read_text()

    assert {name: len(records) for name, records in data["sections"].items()} == {"elementwise": 2, "linear": 6}
    first, sixteen = data["sections"]["linear"][:2]
    assert first["ratios"]["canonical"] == {"R": 1.3, "B": 0.26, "canonical": 1.0}
    assert first["ratios"]["backend"]["canonical"] == 1.0769
    assert list(first["errors"]) == ["canonical", "B"]
    assert all(1e-4 < error < 5e-3 for error in first["errors"].values())
    assert "emulated" in first["times"]
    assert "emulated" not in sixteen["times"]

    assert "64x64        M=1     canonical 0.26 B, 1.30 R!  folded 1.01 B  compiled 0.26 B, 1.01 canonical" in out
    assert "96x32        M=64    canonical 0.26 B  folded" in out
    assert text.startswith("# Fake CPU\n\nkernels avx512_bf16, ")
    assert "L1 32 KiB, L3 8192 KiB" in text
    assert f"torch {torch.__version__}" in text
    assert str(tmp_path) not in text + stored.read_text()
    assert "- canonical, 64x64, M=1: 1.30 R, at most 1.25 R" in text
    assert "- backend, 64x64, M=16: 1.08 canonical, at most 1.02 canonical" in text
    assert "- quantize from bfloat16, 64x64: 50% of a copy, at least 67%" in text
    assert "| 64 x 64 | 91% | 80% | 50%! |" in text  # in as much new memory as the copy's
    assert "| 96 x 32 | 91% | 80% | 50% |" in text  # has no bars
    assert "| 1 | 0.26 B, 1.30 R! | 0.26 B, 1.30 R |" in text
    assert "| 16 | 0.26 B | 0.26 B |" in text


def test_a_stored_run_gives_the_same_page(bench: ModuleType, fake: None, tmp_path: Path, capsys) -> None:
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    assert bench.main([*ARGUMENTS, "--json", str(stored), "--markdown", str(page)]) == 0
    capsys.readouterr()
    assert bench.main(["--from-json", str(stored)]) == 0
    assert capsys.readouterr().out == page.read_text()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the package matplotlib")
def test_the_plot_has_the_columns_of_the_cpu(bench: ModuleType, fake: None, tmp_path: Path) -> None:
    picture, stored = tmp_path / "run.png", tmp_path / "run.json"
    assert bench.main([*ARGUMENTS, "--json", str(stored), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (panel, *_) = bench.plot.draw(json.loads(stored.read_text())).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
    assert lines["canonical"] == [[1, 0.26], [16, 0.26], [64, 0.26]]
    assert set(lines) >= {"folded", "R: only reading the canonical weight"}
    assert "packed" not in lines


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_measured_and_have_no_bars(bench: ModuleType, fake: None, tmp_path: Path, dtype: str) -> None:
    stored, page = tmp_path / "run.json", tmp_path / "run.md"
    words = ["--dtype", dtype, "--sections", "linear", "--json", str(stored), "--markdown", str(page)]
    assert bench.main([*ARGUMENTS, *words]) == 0
    errors = [record["errors"]["canonical"] for record in json.loads(stored.read_text())["sections"]["linear"]]
    assert max(errors) < {"float32": 1e-6, "float16": 5e-4}[dtype]
    assert "No bar of the project applies" in page.read_text()
    assert f"x is {dtype}." in page.read_text()


def test_another_level_than_that_of_the_bars_is_named(
    bench: ModuleType, fake: None, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(room("devices"), "cpu_level", lambda: "avx2")
    page = tmp_path / "run.md"
    assert bench.main([*ARGUMENTS, "--no-emulation", "--markdown", str(page)]) == 0
    assert (
        "The bars of the project are for kernels of the levels amx_bf16, avx512_bf16. These are avx2."
        in page.read_text()
    )
    assert "No bar of the project applies" in page.read_text()
    assert "emulated" not in page.read_text().replace("emulated.", "").partition("Emulated")[0]


def test_bars_are_those_of_the_issue(bench: ModuleType) -> None:
    bars, options = room("bars"), room("options")
    marks = {"n": 4096, "k": 11008, "place": "cpu", "level": "avx512_bf16", "dtype": "bfloat16"}
    ratios = {name: dict.fromkeys(("R", "B", "canonical"), 1.0) for name in ("canonical", "folded", "backend")}
    found = {
        m: {(v.column, v.unit): v.limit for v in bars.verdicts({**marks, "m": m, "ratios": ratios})}
        for m in options.CPU_ROWS
    }
    assert [found[m]["canonical", "B"] for m in options.CPU_ROWS] == [0.27, 0.40, 0.80, 1.00, 1.06, 1.03]
    assert found[1]["canonical", "R"] == 1 / 0.8
    assert all((of["folded", "B"], of["backend", "canonical"]) == (1.02, 1.02) for of in found.values())
    assert list(bars.verdicts({**marks, "m": 1, "ratios": ratios, "level": "avx2"})) == []


# --- columns -------------------------------------------------------------------------------------------------


def test_every_column_computes_the_same_linear(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room("devices").Cpu, "rotated_bytes", 1)
    device = room("devices").Cpu.open()
    weight = device.weight((32, 64), torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    expected = mxfp8_ops.linear(x, *weight.canonical)
    assert_same(torch.nn.functional.linear(x, weight.folded), expected)
    columns = room("sections")._multiplications([weight], x) | device.further([weight], x)
    assert set(columns) >= {"B", "canonical", "folded", "compiled", "backend"}
    for name in ("canonical", "folded", "compiled", "backend"):
        torch.testing.assert_close(columns[name][0](), expected)


def test_r_reads_what_the_kernel_reads(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room("devices").Cpu, "rotated_bytes", 1)
    weight = room("devices").Cpu.open().weight((32, 64), torch.bfloat16)
    assert weight.stored.nbytes == 32 * 64 * 33 // 32
    assert weight.packed is None
    stored = weight.stored.view(torch.uint8)
    assert_same(stored[: 32 * 64], weight.canonical[0].view(torch.uint8).flatten())
    assert_same(stored[32 * 64 :], weight.canonical[1].flatten())


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_word_is_read(bench: ModuleType, streams: int, threads: int) -> None:
    read = room("cpu_reading").reader()
    if read is None:
        pytest.skip("needs a C++ compiler")
    words = torch.randint(-9, 9, (threads * streams * 64,))
    assert read(words.data_ptr(), words.numel(), streams, threads) == words.sum()


def test_kernels_alone_do_what_their_operators_do(bench: ModuleType) -> None:
    if library.current() is None:
        pytest.skip("needs a C++ compiler")
    dense = torch.randn(4, 64).bfloat16()
    columns = room("cpu_kernels").columns([mxfp8_ops.quantize(dense)], [dense])
    for (call,) in columns.values():
        call()
    assert set(columns) == {"dequant alone", "quantize alone"}


def test_torchao_is_a_column_where_it_is_installed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = types.ModuleType("torchao.quantization")
    seen: list[str] = []
    torchao.Float8WeightOnlyConfig = lambda: "config"  # type: ignore[attr-defined]
    torchao.quantize_ = lambda layer, config: seen.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    weight = mxfp8_ops.quantize(torch.randn(32, 64))
    x = torch.randn(3, 64)
    columns = room("others").columns([weight], x)
    assert seen == ["config"]
    torch.testing.assert_close(columns["torchao"][0](), mxfp8_ops.linear(x, *weight))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert "torchao" not in room("others").columns([weight], x)


# --- time ----------------------------------------------------------------------------------------------------


def clocked(monkeypatch: pytest.MonkeyPatch, timing: ModuleType) -> Callable[[str, float], Callable[[], None]]:
    """Makes calls that let a clock go on by as many microseconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def call(us: float, done: list[str], name: str) -> Callable[[], None]:
        def run() -> None:
            clock.now += us / 1e6
            done.append(name)

        return run

    return call


def test_columns_take_turns_and_go_on_with_the_weights(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = room("timing")
    call, done = clocked(monkeypatch, timing), []
    columns = {
        "slow": [call(80_000, done, f"s{i}") for i in range(3)],
        "fast": [call(20_000, done, f"f{i}") for i in range(4)],
    }
    times = timing.CpuTimer().interleaved(columns, 3)
    assert times == {"slow": pytest.approx([80_000] * 3), "fast": pytest.approx([20_000] * 3)}
    assert done[4:] == ["s0", "f2", "f3", "f0", "f1", "f2", "f3", "s1", "s2", "f0", "f1", "f2"]


def test_what_runs_for_long_is_timed_after_as_long_a_time(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = room("timing")
    call, done = clocked(monkeypatch, timing), []
    calls = [call(20_000, done, "a"), call(40_000, done, "b")]
    us, seen = timing.CpuTimer().sustained(calls, 0.19, lambda: len(done))
    assert seen == 2 + 2 * 5  # of 40 ms, which the second one takes
    assert "".join(done) == "ab" * 6
    assert us == pytest.approx((3 * 40_000 + 2 * 20_000) / 5)


def test_caches_are_read_as_the_system_tells_them(bench: ModuleType, tmp_path: Path, monkeypatch) -> None:
    processor = room("processor")
    sizes = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "33M")]
    for i, each in enumerate(sizes):
        (tmp_path / f"index{i}").mkdir()
        for name, value in zip(("level", "type", "size"), each, strict=True):
            (tmp_path / f"index{i}" / name).write_text(f"{value}\n")
    monkeypatch.setattr(processor.os, "sysconf", lambda name: 34 << 20)
    assert processor.caches(tmp_path) == {"L1": 48 << 10, "L2": 2 << 20, "L3": 34 << 20}
    monkeypatch.setattr(processor.os, "sysconf", lambda name: 0)
    assert processor.caches(tmp_path)["L3"] == 33 << 20
    assert processor.caches(tmp_path / "none") == {}


def test_weights_rotate_over_more_than_four_times_the_last_cache(bench: ModuleType, monkeypatch) -> None:
    processor = room("processor")
    monkeypatch.setattr(processor, "caches", lambda: {"L1": 32 << 10, "L3": 64 << 20})
    monkeypatch.setattr(processor, "available_memory", lambda: 64 << 30)
    device = room("devices").Cpu.open()
    assert device.copies(4096 * 4096) * 4096 * 4096 > 4 * (64 << 20)
    monkeypatch.setattr(processor, "available_memory", lambda: 1 << 30)
    assert device.copies(4096 * 4096) == 5


# --- arguments -------------------------------------------------------------------------------------------------


def test_the_cpu_has_defaults_of_its_own(bench: ModuleType) -> None:
    options = bench.selected(bench.parser().parse_args(["--device", "cpu"]))
    assert options.shapes == ((4096, 4096), (11008, 4096), (4096, 11008))
    assert (options.rows, options.sections) == ((1, 4, 16, 64, 256, 1024), ("elementwise", "linear"))
    quick = bench.selected(bench.parser().parse_args(["--device", "cpu", "--quick"]))
    assert (quick.shapes, quick.rows, quick.emulated) == (((4096, 4096),), (1, 4, 16, 64, 256), (1,))


def test_a_section_that_the_cpu_does_not_have_is_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--device", "cpu", "--sections", "linear", "host"])
    assert exit_.value.code == 2
    assert "argument --sections: invalid choice: 'host' on the CPU" in capsys.readouterr().err
