"""``scripts/sanitize_cpu.py``: the kernels are clean in a small run, and kernels that are not are found out."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from programs import SCRIPTS, imported

from mxfp8_ops.cpu import build, library

FAULTY = """
#include <cstdint>
extern "C" int mxfp8_abi(void) { return ABI; }
extern "C" void mxfp8_dequant(void) {}
extern "C" int mxfp8_linear(void) { return 0; }
extern "C" void mxfp8_quantize(const uint8_t* x, uint8_t* weight, uint8_t* scale, int64_t blocks, int, int, int) {
  scale[blocks] = x[0];
}
"""


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("sanitize_cpu", monkeypatch) as module:
        yield module


def needs_sanitizers(sanitize: ModuleType) -> None:
    try:
        sanitize.runtimes()
    except build.BuildError as error:
        pytest.skip(str(error))


def test_the_kernels_are_clean_in_a_small_run(sanitize: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    needs_sanitizers(sanitize)
    level = library.supported()[0]
    status = sanitize.main(["--small", "--levels", level])
    out = capfd.readouterr().out
    assert status == 0, out
    assert out.startswith(f"{level:<12} clean ")
    assert "cases are right" in out


def test_a_kernel_that_writes_past_the_end_is_found(sanitize: ModuleType, tmp_path: Path, capfd) -> None:
    needs_sanitizers(sanitize)
    (tmp_path / "faulty.cpp").write_text(FAULTY.replace("ABI", str(library.ABI)))
    assert sanitize.main(["--small", "--levels", "generic", "--sources", str(tmp_path)]) == 1
    out = capfd.readouterr().out
    assert out.startswith(f"{'generic':<12} errors ")
    assert "heap-buffer-overflow" in out
    assert "mxfp8_quantize" in out
    assert len(out.splitlines()) <= sanitize.LINES + 1


@pytest.mark.parametrize(
    ("output", "status", "verdict", "expected"),
    [
        ("case\\n9 cases are right", 0, "clean", 0),
        ("case\\nAssertionError: 5 is not 6", 1, "worker failed", 3),
        ("case\\nx.cpp:1:2: runtime error: shift exponent 40 is too large", 1, "errors", 1),
        ("case\\n==7==ERROR: AddressSanitizer: SEGV on unknown address", 1, "errors", 1),
    ],
)
def test_a_worker_is_judged_by_what_it_writes(
    sanitize: ModuleType, monkeypatch, capfd, output: str, status: int, verdict: str, expected: int
) -> None:
    finished = sanitize.tools.Finished(output.replace("\\n", "\n"), status, 1.0)
    monkeypatch.setattr(sanitize, "runtimes", lambda: [])
    monkeypatch.setattr(sanitize.tools, "run", lambda command, limit, environment: finished)
    assert sanitize.main(["--levels", "generic"]) == expected
    assert capfd.readouterr().out.startswith(f"{'generic':<12} {verdict} ")


def test_a_level_that_takes_too_long_is_no_success(sanitize: ModuleType, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sanitize, "runtimes", lambda: [])
    monkeypatch.setattr(sanitize.tools, "run", lambda *_: sanitize.tools.Finished("case\n", None, 600.0))
    assert sanitize.main(["--levels", "generic"]) == 3
    assert "out of time" in capfd.readouterr().out


def test_without_a_sanitizer_or_a_compiler_is_one_line_and_status_2(
    sanitize: ModuleType, tmp_path: Path, monkeypatch, capfd
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')  # as GCC does with files that it has not
    compiler.chmod(0o755)
    for name, reason in ((str(compiler), f"{compiler} has no libasan.so"), ("none", "CXX names 'none', which is no")):
        monkeypatch.setenv("CXX", name)
        assert sanitize.main([]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"sanitize-cpu: {reason}")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_command_of_the_makefile_is_this_script() -> None:
    command = ["make", "--dry-run", "--always-make", "sanitize-cpu"]
    printed = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True, check=True).stdout
    assert "python scripts/sanitize_cpu.py || [ $? = 2 ]" in printed
