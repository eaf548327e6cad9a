"""The section of scripts/bench.py that counts bytes: Nsight Compute is a script that prints what it was told to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import benching
import pytest
import torch
from benching import FakeTimer

bench, fake = benching.bench, benching.fake

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
