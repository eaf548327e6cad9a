"""The console command mxfp8-convert: every option, what it prints, every error."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dialects import WRITERS, random_content
from safetensors.torch import load_file, save_file

from mxfp8_ops import reference
from mxfp8_ops.checkpoint import convert, open_checkpoint
from mxfp8_ops.checkpoint.converting import cli, writing

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in an empty folder; its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        try:
            status = cli.main([*map(str, args)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def floats(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The content of a checkpoint ``in``, without config."""
    weights = {
        "layers.0.up.weight": torch.randn(96, 64).bfloat16(),
        "layers.0.down.weight": torch.randn(64, 96).bfloat16(),
        "layers.0.odd.weight": torch.randn(64, 40).bfloat16(),
        "norm.weight": torch.randn(64).bfloat16(),
    }
    (tmp_path / "in").mkdir()
    save_file(weights, tmp_path / "in" / "model.safetensors")
    return weights


def squeezed(text: str) -> str:
    return re.sub(r" +", " ", text)


def test_program_in_a_pipe_prints_a_table_without_colour_or_progress(floats, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "in", "out", "--verify"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "40", "MXFP8_KERNELS": "off"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    up = floats["layers.0.up.weight"]
    error = up.double() - reference.dequant(*reference.quantize(up), torch.float32).double()
    ratio = 10 * math.log10(float(up.double().square().sum() / error.square().sum()))
    lines = squeezed(done.stdout)
    assert f" layers.0.up 96x64 quantized 12,288 6,336 {ratio:.2f}" in lines
    assert " layers.0.odd 64x40 left 5,120 5,120 K = 40 is not a multiple of 32" in lines
    assert "quantized: 2 layers, 24.58 kB -> 12.67 kB\n" in lines
    assert (
        "left: 1 layers, 5.12 kB\ncopied: 1 tensors, 128 bytes\n" in lines or "copied: 1 tensors, 128 bytes\n" in lines
    )
    assert "linears were told by their names (config.json names no architecture)" in lines
    assert "verified: read again, every layer and tensor is what it should be" in lines
    assert re.search(r"unquantized -> modelopt, rule rceil: .*out, 17\.92 kB in 1 files, \d+\.\d s\n$", lines)
    assert open_checkpoint(tmp_path / "out").keys() == {"layers.0.up", "layers.0.down"}


def test_progress_is_a_bar_on_standard_error(floats, tmp_path: Path, capsys) -> None:
    convert(tmp_path / "in", tmp_path / "out", verify=True, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"converting: 100%.* 17\.9k/17\.9k", err)
    assert re.search(r"verifying: 100%", err)


def test_the_console_command_is_this_program() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["mxfp8-convert"] == "mxfp8_ops.checkpoint.converting.cli:main"


def test_without_rich_the_same_is_printed_as_plain_text(floats, run: Run, monkeypatch) -> None:
    _, rich, _ = run("in", "one")
    for name in ("rich", "rich.box", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    status, plain, _ = run("in", "two")
    assert status == 0

    def words(text: str) -> list[str]:
        return [line for line in squeezed(re.sub(r"\d+\.\d s|─|out|one|two", "", text)).splitlines() if line.strip()]

    assert [line.strip() for line in words(plain)] == [line.strip() for line in words(rich)]


@pytest.mark.parametrize(("word", "dtype"), cli.DTYPES.items())
def test_to_a_dtype_dequantizes(run: Run, tmp_path: Path, word: str, dtype: torch.dtype) -> None:
    content = random_content()
    WRITERS["quark"](tmp_path / "in", content)
    status, out, _ = run("in", "out", "--to", word)
    assert status == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in content.layers.items():
        expected = reference.dequant(layer.weight, layer.scale, dtype)
        assert torch.equal(found[f"{name}.weight"].view(torch.uint8), expected.view(torch.uint8))
    assert "quark -> unquantized: " in out
    assert "dequantized: 3 layers" in out


@pytest.mark.parametrize("format", ["modelopt", "mxfp8", "fp8-1x32", "compressed-tensors"])
def test_to_a_format_converts(run: Run, tmp_path: Path, format: str) -> None:
    WRITERS["torchao-swizzled"](tmp_path / "in", random_content())
    status, out, _ = run("in", "out", "--to", format, "--verify")
    assert status == 0
    assert f"torchao -> {format}: " in out
    assert open_checkpoint(tmp_path / "out").format.name == format


def test_rule_ignore_only_and_shard_size_reach_the_conversion(floats, run: Run, tmp_path: Path) -> None:
    options = [
        "--rule",
        "floor",
        "--ignore",
        "*.down",
        "--ignore",
        "*.odd",
        "--only",
        "layers.*",
        "--max-shard-size",
        "7kB",
    ]
    status, out, _ = run("in", "out", *options)
    assert status == 0
    assert squeezed(out).count("ignored on request") == 2
    assert "rule floor" in out
    written = {path.name: load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert list(written) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    found = {name: tensor for tensors in written.values() for name, tensor in tensors.items()}
    codes, scale = reference.quantize(floats["layers.0.up.weight"], "floor")
    assert torch.equal(found["layers.0.up.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found["layers.0.up.weight_scale"], scale)


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("4096", 4096), ("12B", 12), ("7TB", 7 * 10**12)]
)
def test_sizes_have_units(text: str, count: int) -> None:
    assert cli.size(text) == count


def test_json_has_every_row(floats, run: Run, tmp_path: Path) -> None:
    assert run("in", "out", "--json", "summary.json")[0] == 0
    data = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert rows.keys() == {"layers.0.up", "layers.0.down", "layers.0.odd", "norm.weight"}
    assert rows["norm.weight"]["action"] == "copied"
    assert rows["layers.0.odd"]["reason"] == "K = 40 is not a multiple of 32"
    assert 25 < rows["layers.0.up"]["snr_db"] < 40
    assert data["source_format"] == "unquantized"
    assert data["rule"] == "rceil"
    assert data["shards"] == ["model.safetensors"]


def test_no_file_is_overwritten_without_force(floats, run: Run, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("mine")
    status, out, err = run("in", "out", "--json", "summary.json")
    assert (status, out) == (2, "")
    assert err == "mxfp8-convert: summary.json exists: choose another file, or --force to replace it\n"
    assert not (tmp_path / "out").exists()
    assert run("in", "out", "--json", "summary.json", "--force")[0] == 0
    status, out, err = run("in", "out")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"mxfp8-convert: .*out exists: choose another folder, or --force .*\n", err)
    assert run("in", "out", "--force", "--to", "mxfp8")[0] == 0
    assert open_checkpoint(tmp_path / "out").format.name == "mxfp8"


def test_a_difference_that_verify_finds_is_status_1(floats, run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "_bytes", lambda tensor: memoryview(bytes(tensor.nbytes)))
    status, out, err = run("in", "out", "--verify")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"mxfp8-convert: \d of 4 were not written as they should be: .*norm\.weight .*\n", err)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_says_how_to_go_on(floats, run: Run, tmp_path: Path, monkeypatch) -> None:
    calls = iter(range(99))

    def interrupted(tensor: torch.Tensor, original: Any = writing._bytes) -> memoryview:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_bytes", interrupted)
        status, out, err = run("in", "out", "--max-shard-size", "7kB")
    assert (status, out) == (2, "")
    assert err == "mxfp8-convert: interrupted: the same command goes on from where it was\n"
    status, out, _ = run("in", "out", "--max-shard-size", "7kB")
    assert status == 0
    assert "resumed: 2 of 3 files were finished by an earlier run" in out


def broken_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def float_scales(folder: Path) -> None:
    weights = {"a.weight": torch.zeros(32, 64).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(32, 2)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "modelopt", "quant_algo": "MXFP8"}}')


def unknown_format(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')


def zero_scales(folder: Path) -> None:
    """Which only values tell, after the first shard is written."""
    weights = {"a.weight": torch.ones(32, 64).to(torch.float8_e4m3fn), "a.weight_scale": torch.zeros(32, 2).byte()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "modelopt", "quant_algo": "MXFP8"}}')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (broken_header, r"in/model\.safetensors: norm\.weight .*truncated or damaged"),
        (pickles, r"pytorch_model\.bin: pickles can run code when they are loaded and are not read"),
        (float_scales, r"a\.weight_scale \(F32 \[32, 2\] in model\.safetensors\) must be E8M0 bytes"),
        (unknown_format, r"in: the checkpoint's format is none of .*'gptq'"),
        (zero_scales, r"a\.weight_scale \(U8 .* all scales are 0"),
        (lambda folder: (folder / "config.json").write_text("{"), r"in/config\.json: not readable as JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"in: no \.safetensors file"),
    ],
)
def test_a_bad_checkpoint_is_one_line_that_names_file_and_tensor(
    floats, run: Run, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(tmp_path / "in")
    status, out, err = run("in", "out")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(said, err), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere", "out"], "nowhere: no such file or folder"),
        (["in", "in"], "must be a folder apart from the source"),
        (["in", "out", "--to", "bf16"], "is not quantized: there is nothing to dequantize"),
        (["in", "out", "--to", "gguf"], "invalid choice: 'gguf'"),
        (["in", "out", "--rule", "ceil"], "invalid choice: 'ceil'"),
        (["in", "out", "--max-shard-size", "big"], "expected a size such as 500MB or 5GB, got 'big'"),
        (["in", "out", "--max-shard-size", "0"], "expected a size such as 500MB or 5GB, got '0'"),
        (["in", "out", "--json", "no/such/folder.json"], "no/such/folder.json cannot be written"),
        (["in"], "the following arguments are required: TARGET"),
    ],
)
def test_a_bad_argument_is_status_2_and_nothing_is_written(
    floats, run: Run, tmp_path: Path, args: list[str], said: str
) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_what_nobody_foresaw_is_one_line_and_debug_shows_where(floats, run: Run, monkeypatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "convert", broken)
    assert run("in", "out") == (2, "", "mxfp8-convert: KeyError: 'a bug'\n")
    assert "Traceback" in run("in", "out", "--debug")[2]


def test_a_folder_that_cannot_be_written_is_one_line(floats, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = run("in", "file/out")
    assert status == 2
    assert re.fullmatch(r"mxfp8-convert: .*file.*: Not a directory\n|mxfp8-convert: .*file: File exists\n", err)
