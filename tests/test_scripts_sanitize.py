"""``scripts/sanitize.py`` without a device: under a compute-sanitizer that is made up, with a worker that is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from programs import SCRIPTS, imported

WORKER = "import sys; print('case'); print('sanitize: 5 cases are right')"
RIGHT = "sanitize: 5 cases are right\n"
HEAD = "========= COMPUTE-SANITIZER\n"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"
INVALID = f"========= Invalid __global__ read of size 4 bytes\n=========     at kernel in {SCRIPTS.parent}/mxfp8.py:7\n"
TOOL = """#!/bin/sh
[ "$1" = --version ] && echo "Version 2025.3.1" && exit
tool=$2
while [ "$1" != "$PYTHON" ]; do shift; done
echo "========= COMPUTE-SANITIZER"
{body}
"""
PASSES = (
    '"$@"; case $tool in racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;\
 *) echo "========= ERROR SUMMARY: 0 errors";; esac'
)


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """With a device, and a worker that has nothing to do."""
    found = {"device": "Fake GPU", "torch": "2.11", "triton": "3.6", "cuda": "13.0"}
    device = SimpleNamespace(missing=lambda: None, open=lambda: SimpleNamespace(environment=lambda: found))
    with imported("sanitize", monkeypatch) as module:
        devices = importlib.import_module("benchmarks.devices")
        monkeypatch.setitem(devices.DEVICES, "cuda", device)
        monkeypatch.setattr(module, "WORKER", [sys.executable, "-c", WORKER])
        yield module


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compute-sanitizer on PATH."""
    path = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTHON", sys.executable)
    write(path, PASSES)
    return path


def write(path: Path, body: str) -> None:
    path.write_text(TOOL.format(body=body))
    path.chmod(0o755)


def test_a_clean_run_is_a_table_and_a_page(sanitize: ModuleType, tool: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    assert sanitize.main(["--markdown", str(page)]) == 0
    out, text = capsys.readouterr().out, page.read_text()
    assert "memcheck  clean  5  0  ERROR SUMMARY: 0 errors" in out
    assert text.startswith("# Fake GPU, compute-sanitizer\n\ncompute-sanitizer 2025.3.1, torch 2.11, triton 3.6, CUDA")
    assert "`python scripts/sanitize.py --markdown page.md`" in text
    rows = [line.split(" | ")[:5] for line in text.splitlines() if line.startswith("| ")][1:]
    racecheck = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert rows == [
        [f"| {name}", "clean", "5", "0", racecheck if name == "racecheck" else "ERROR SUMMARY: 0 errors"]
        for name in sanitize.TOOLS
    ]
    assert "##" not in text


def test_errors_are_status_1_and_in_the_page(sanitize: ModuleType, tool: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    write(tool, f"\"$@\"; printf '{INVALID}'; echo '========= ERROR SUMMARY: 2 errors'; exit 99")
    assert sanitize.main(["--tools", "memcheck", f"--markdown={page}"]) == 1
    assert "memcheck  errors  5  2  ERROR SUMMARY: 2 errors" in capsys.readouterr().out
    text = page.read_text()
    assert "| memcheck | errors | 5 | 2 | ERROR SUMMARY: 2 errors |" in text
    assert f"## memcheck\n\n```\n{HEAD}========= Invalid __global__ read of size 4 bytes\n" in text
    assert "at kernel in mxfp8.py:7" in text  # no folder of this machine


def test_a_tool_that_hangs_is_stopped(sanitize: ModuleType, tool: Path, capsys) -> None:
    write(tool, "echo last case; sleep 60")
    assert sanitize.main(["--tools", "synccheck", "--limit", "0.5"]) == 3
    out = capsys.readouterr().out
    assert "synccheck  out of time  ?  ?  none" in out
    assert "last case" in out


def test_a_worker_that_fails_alone_is_nothing_that_the_tool_has_found(sanitize: ModuleType, tool: Path, capsys) -> None:
    write(tool, "echo 'AssertionError: wrong'; echo '========= ERROR SUMMARY: 0 errors'; exit 1")
    assert sanitize.main(["--tools", "memcheck"]) == 3
    out = capsys.readouterr().out
    assert "memcheck  worker failed  ?  0  ERROR SUMMARY: 0 errors" in out
    assert "AssertionError: wrong" in out


def test_a_worker_that_fails_without_a_tool_ends_the_run(
    sanitize: ModuleType, tool: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sanitize, "WORKER", [sys.executable, "-c", "raise AssertionError('wrong')"])
    assert sanitize.main([]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "AssertionError: wrong" in err
    assert "sanitize: the cases fail without a tool, too" in err


def test_without_a_tool_is_one_line_and_status_2(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitize.tools, "TOOLKIT", str(tmp_path))
    assert sanitize.main([]) == 2
    assert capsys.readouterr().err == f"sanitize: there is no compute-sanitizer on PATH or in {tmp_path}\n"
    assert sanitize.main(["--markdown", str(tmp_path / "no" / "page.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_is_one_line_and_status_2(tool: Path) -> None:
    script = [sys.executable, str(SCRIPTS / "sanitize.py")]
    result = subprocess.run(script, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "sanitize: there is no CUDA device\n")


@pytest.mark.parametrize(
    ("output", "status", "verdict", "errors"),
    [
        (f"{HEAD}{RIGHT}{CLEAN}", 0, "clean", 0),
        (f"{RIGHT}========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", 0, "errors", 1),
        (f"{INVALID}Traceback\n========= ERROR SUMMARY: 3 errors\n", 1, "errors", 3),
        (
            f"{RIGHT}========= ERROR SUMMARY: 900 errors\n========= ERROR SUMMARY: 800 errors were not printed.\n",
            99,
            "errors",
            900,
        ),
        (f"{RIGHT}{CLEAN}", 99, "errors", 0),
        (f"{RIGHT}{HEAD}", 0, "tool failed", None),
        (CLEAN, 0, "worker failed", 0),
        (CLEAN, -11, "worker failed", 0),
        (INVALID, None, "out of time", None),
    ],
)
def test_verdicts_tell_the_tool_and_the_worker_apart(
    sanitize: ModuleType, output: str, status: int | None, verdict: str, errors: int | None
) -> None:
    finding = sanitize.judged("memcheck", sanitize.Finished(output, status, 1.0))
    assert (finding.verdict, finding.errors) == (verdict, errors)
    assert bool(finding.report) == (verdict != "clean")


def test_races_are_told_by_their_lines_of_source(sanitize: ModuleType) -> None:
    race = "========= Error: Race reported between Read access at kernel+{} in a.py:9\n"
    other = "=========     and Write access at kernel+0x7 in b.py:{} [{} hazards]\n"
    output = race.format("0x1") + other.format(3, 4) + race.format("0x2") + other.format(3, 8) + other.format(5, 1)
    summary = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    first, second, third, *_ = sanitize.judged("racecheck", sanitize.Finished(output + summary, 99, 1.0)).report
    assert first == "Read in a.py:9, Write in b.py:3: 12 hazards"
    assert second == "Read in a.py:9, Write in b.py:5: 1 hazards"
    assert third.startswith("====")


def test_what_was_found_before_the_time_was_over_is_shown(sanitize: ModuleType) -> None:
    output = "========= Invalid read of size 4\n" + "a case\n" * 100
    finding = sanitize.judged("memcheck", sanitize.Finished(output, None, 200.0))
    assert finding.verdict == "out of time"
    assert finding.report[:2] == ["========= Invalid read of size 4", "a case"]


def test_only_cases_with_a_text_in_their_names_run(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("triton")
    case, cases = (importlib.import_module(f"benchmarks.{name}") for name in ("case", "cases"))
    found = [case.Case(name, lambda: None) for name in ("wide, one", "narrow", "wide, another")]
    monkeypatch.setattr(cases, "cases", lambda: iter(found))
    assert sanitize.main(["--worker", "0/1", "--only", "wide"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wide, one", "wide, another", "sanitize: 2 cases are right"]
    assert sanitize.main(["--worker", "1/2", "--only", "wide"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wide, another", "sanitize: 1 cases are right"]
    assert sanitize.main(["--worker", "0/1", "--only", "tall"]) == 1
    assert capsys.readouterr().out == "sanitize: no case has 'tall' in its name\n"


def test_the_text_is_handed_to_the_worker(
    sanitize: ModuleType, tool: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    worker = "import sys; assert sys.argv[2:] == ['--only', 'wide'], sys.argv; print('sanitize: 5 cases are right')"
    monkeypatch.setattr(sanitize, "WORKER", [sys.executable, "-c", worker])
    assert sanitize.main(["--only", "wide"]) == 0
    assert "memcheck  clean  5  0" in capsys.readouterr().out


def test_cases_launch_every_kernel_for_hopper(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    cases = importlib.import_module("benchmarks.cases")
    plans, plans_few = (importlib.import_module(f"mxfp8_ops.gpu.{name}") for name in ("plans", "plans_few"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(cases.dispatch, "reads_packed", lambda _: True)
    names = [case.name for case in cases.cases()]
    assert len(set(names)) == len(names)
    for packed in (True, False):
        planned = [plan for problem, plan in cases._planned() if problem.packed == packed]
        assert {plans._kind(plan) for plan in planned if isinstance(plan, plans.Skinny)} == set(plans.TABLE)
        wide = {plan for plan in planned if isinstance(plan, plans.Wide)}
        assert {(plan.shared > 0, plan.shared < plan.programs) for plan in wide} == {
            (False, True),  # whole tiles alone
            (True, False),  # more than a tile for each program
            (True, True),
        }
        direct = {plan for plan in planned if isinstance(plan, plans_few.Direct)}
        assert direct == ({*plans_few.ROW, *plans_few.FOUR, *plans_few.EIGHT} if packed else set())
        narrow = {plan for plan in planned if isinstance(plan, plans_few.Narrow)}
        assert narrow == (set(plans_few.NARROW) if packed else set())
    plans_vectors = importlib.import_module("mxfp8_ops.gpu.plans_vectors")
    for whole_blocks in (True, False):
        assert {kind for problem, kind in cases._vectors() if (problem.k % 128 == 0) == whole_blocks} == set(
            plans_vectors.COSTS
        )
