"""What becomes of each tensor of a checkpoint: every format into every other, and out of MXFP8."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import SCALES, assert_holds, made, quantization_config, save, tensors_in
from dialects import (
    EXPERTS,
    WRITERS,
    Content,
    padded,
    ragged,
    random_content,
    with_kv_scales,
)
from helpers import assert_same, expected_from_float64
from torch import Tensor

from mxfp8_ops import reference
from mxfp8_ops.checkpoint import Checkpoint, CheckpointError, convert, open_checkpoint
from mxfp8_ops.checkpoint.converting.linears import Linears
from mxfp8_ops.checkpoint.converting.plan import Options, plan
from mxfp8_ops.checkpoint.formats import WRITABLE


def on_disk(content: Content, format: str) -> dict[str, Tensor]:
    """What a checkpoint of ``content`` holds in one of the formats that are written."""
    of_module, of_experts = SCALES[format]
    found = dict(content.plain)
    for name, layer in content.layers.items():
        stacked = layer.weight.dim() > 2
        found[name if stacked else f"{name}.weight"] = layer.weight
        found[f"{name}{of_experts if stacked else of_module}"] = layer.scale
        if layer.bias is not None:
            found[f"{name}_bias" if stacked else f"{name}.bias"] = layer.bias
    return found


# --- MXFP8 to MXFP8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_codes_and_scales_of_every_format_stay_bit_for_bit_in_every_other(tmp_path: Path, writer: str) -> None:
    shards = 1 if writer.startswith("comfyui") else 2
    source, content = made(tmp_path / writer, writer, random_content(nan_codes=True), shards=shards)
    for format in WRITABLE:
        target = tmp_path / f"to {format}"
        summary = convert(source, target, format, verify=True)
        assert_holds(target, on_disk(content, format))
        assert open_checkpoint(target).format.name == format
        actions = {row.name: row.action for row in summary.layers}
        assert actions == {
            **dict.fromkeys(content.layers, "converted"),
            "model.embed_tokens": "left",
            "lm_head": "left",
        }
        assert all(row.snr_db is None for row in summary.rows)


@pytest.mark.parametrize("writer", ["modelopt", "mxfp8", "fp8-32x32", "torchao", "torchao-swizzled"])
def test_experts_in_one_tensor_stay_one_where_the_format_has_that(tmp_path: Path, writer: str) -> None:
    layers = {name: (2, 256, 64) if "swizzled" in writer else shape for name, shape in EXPERTS.items()}
    source, content = made(tmp_path / writer, writer, random_content(layers=layers))
    for format in ("modelopt", "mxfp8", "fp8-1x32"):
        convert(source, tmp_path / f"to {format}", format, verify=True)
        assert_holds(tmp_path / f"to {format}", on_disk(content, format))
    with pytest.raises(CheckpointError, match=r"_proj.* holds experts in one tensor, of which compressed-tensors"):
        convert(source, tmp_path / "none", "compressed-tensors")
    assert not (tmp_path / "none").exists()
    convert(source, tmp_path / "dense", "unquantized")
    for name, layer in content.layers.items():
        assert_same(tensors_in(tmp_path / "dense")[name], reference.dequant(layer.weight, layer.scale))


def test_a_layer_whose_k_a_format_cannot_say_is_dequantized_and_named(tmp_path: Path) -> None:
    content = ragged(random_content(scale_bytes=range(100, 150)))
    source, _ = made(tmp_path / "modelslim", "modelslim", content)
    with pytest.raises(CheckpointError, match=r"no layer would be MXFP8: .*down_proj: K = 140 is not a multiple of 32"):
        convert(source, tmp_path / "out")
    whole = random_content(layers={"whole": (64, 64)})
    source = WRITERS["modelslim"](tmp_path / "mixed", replace(content, layers=content.layers | whole.layers))
    summary = convert(source, tmp_path / "out", verify=True)
    reasons = {row.name: row.reason for row in summary.layers if row.action == "dequantized"}
    assert reasons == {
        name: f"K = {layer.weight.shape[1]} is not a multiple of 32, which modelopt cannot say"
        for name, layer in content.layers.items()
    }
    found = tensors_in(tmp_path / "out")
    for name, layer in content.layers.items():
        filled = padded(content).layers[name]
        expected = reference.dequant(filled.weight, filled.scale)[:, : layer.weight.shape[1]].contiguous()
        assert_same(found[f"{name}.weight"], expected)
    assert_same(found["whole.weight"], whole.layers["whole"].weight)
    assert set(content.layers) | {"lm_head"} == set(quantization_config(tmp_path / "out")["ignore"])


def test_what_described_the_old_format_does_not_come_along(tmp_path: Path) -> None:
    for writer in ("modelslim", "auto-round", "comfyui", "torchao", "modelopt-hf-quant-config"):
        source, _ = made(tmp_path / writer, writer, random_content())
        target = tmp_path / f"from {writer}"
        convert(source, target, "mxfp8")
        files = {path.name for path in target.iterdir()}
        assert files == {"config.json", "model.safetensors"}, writer
        assert not any("comfy" in name for name in tensors_in(target))
        assert set(quantization_config(target)) == {
            "quant_method", "activation_scheme", "weight_block_size", "scale_fmt", "ignored_layers",
            "modules_to_not_convert",
        }  # fmt: skip


def test_a_file_without_config_gets_one_with_the_quantization_alone(tmp_path: Path) -> None:
    source, _ = made(tmp_path / "comfyui", "comfyui", random_content())
    (source / "another model.txt").touch()
    convert(source / "model_mxfp8.safetensors", tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())) == {"quantization_config"}
    assert not (tmp_path / "out" / "another model.txt").exists()
    convert(source / "model_mxfp8.safetensors", tmp_path / "dense", "unquantized")
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {"model.safetensors"}


def test_modelopt_has_its_older_file_as_well_and_both_agree(tmp_path: Path) -> None:
    source, _ = made(tmp_path / "quark", "quark", random_content())
    convert(source, tmp_path / "out")
    older = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert older["exclude_modules"] == quantization_config(tmp_path / "out")["ignore"] == ["lm_head"]
    assert (older["quant_algo"], older["group_size"]) == ("MXFP8", 32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert len(open_checkpoint(tmp_path / "out")) == 3


def test_scales_of_a_cache_come_along_and_are_named(tmp_path: Path) -> None:
    source, content = made(tmp_path / "modelopt", "modelopt", with_kv_scales(random_content()))
    summary = convert(source, tmp_path / "out", "fp8-1x32")
    assert_holds(tmp_path / "out", on_disk(content, "fp8-1x32"))
    assert "scales of activations, model.layers.0.self_attn.k_proj.k_scale" in str(summary)


def test_options_of_quantization_are_refused_for_what_is_quantized(tmp_path: Path) -> None:
    source, _ = made(tmp_path / "quark", "quark", random_content())
    for options in ({"rule": "rceil"}, {"ignore": ["lm_head"]}, {"only": ["*"]}):
        (name,) = options
        with pytest.raises(ValueError, match=rf"is MXFP8 already \(quark\).* so leave {name} out"):
            convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# --- MXFP8 to floats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("writer", ["modelopt", "fp8-32x32", "torchao-swizzled", "modelslim"])
def test_dequantized_weights_are_those_of_the_reference(tmp_path: Path, writer: str, dtype: torch.dtype) -> None:
    content = random_content(nan_codes=True)
    content = ragged(content) if writer == "modelslim" else content
    content.config |= {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "hidden_size": 7}}
    source, whole = made(tmp_path / writer, writer, content)
    summary = convert(source, tmp_path / "out", "unquantized", dtype=dtype, verify=True)
    expected = dict(content.plain)
    for name, layer in whole.layers.items():
        dense = expected_from_float64(layer.weight, layer.scale, dtype)
        expected[f"{name}.weight"] = dense[:, : content.layers[name].weight.shape[1]].contiguous()
        if layer.bias is not None:
            expected[f"{name}.bias"] = layer.bias
    assert_holds(tmp_path / "out", expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = str(dtype).removeprefix("torch.")
    assert config == {"model_type": "llama", "dtype": said, "text_config": {"torch_dtype": said, "hidden_size": 7}}
    assert not open_checkpoint(tmp_path / "out").sources
    for row in summary.layers:
        if row.action == "dequantized":
            assert row.not_finite == int((~expected[f"{row.name}.weight"].isfinite()).sum())


def test_what_a_smaller_dtype_loses_is_in_the_summary(tmp_path: Path) -> None:
    content = random_content(layers={"exact": (64, 64)}, scale_bytes=range(112, 135))
    content.layers |= random_content(layers={"rounded": (64, 64)}, scale_bytes=range(98, 100)).layers
    content.layers |= random_content(layers={"too large": (64, 64)}, scale_bytes=range(150, 151)).layers
    source, _ = made(tmp_path / "mxfp8", "mxfp8", content)
    summary = convert(source, tmp_path / "out", "unquantized", dtype=torch.float16)
    rows = {row.name: row for row in summary.layers}
    assert (rows["exact"].snr_db, rows["exact"].not_finite) == (None, 0)
    layer, dense = content.layers["rounded"], tensors_in(tmp_path / "out")["rounded.weight"].double()
    exact = reference.dequant(layer.weight, layer.scale, torch.float32).double()
    expected = 10 * math.log10(float(exact.square().sum() / (exact - dense).square().sum()))
    assert rows["rounded"].snr_db == pytest.approx(expected, rel=1e-9)
    assert rows["too large"].not_finite > 3000
    assert f"too large: {rows['too large'].not_finite} elements are inf or NaN" in str(summary)


def test_without_a_dtype_it_is_that_of_the_config(tmp_path: Path) -> None:
    content = random_content()
    content.config["dtype"] = "float16"
    source, _ = made(tmp_path / "quark", "quark", content)
    convert(source, tmp_path / "out", "unquantized")
    assert tensors_in(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].dtype == torch.float16


def test_linears_are_not_looked_for_in_what_is_quantized(tmp_path: Path) -> None:
    source, _ = made(tmp_path / "quark", "quark", random_content())

    def never() -> Linears:
        raise AssertionError

    checkpoint: Checkpoint = open_checkpoint(source)
    assert plan(checkpoint, Options(WRITABLE["mxfp8"]), never).unquantized == ["lm_head"]


# --- other files ---------------------------------------------------------------------------------------------


def test_files_of_the_model_come_along_and_weights_pickles_and_links_elsewhere_do_not(tmp_path: Path) -> None:
    source = save(tmp_path / "in", {"a.weight": torch.randn(64, 64)}, {"hidden_size": 64})
    (tmp_path / "secret").write_text("of somebody else")
    kept = [
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "generation_config.json",
        "1_Pooling/config.json",
    ]
    stay = ["pytorch_model.bin", "optimizer.pt", "model.onnx", "pytorch_model.bin.index.json", ".git/config", ".hidden"]
    for name in (*kept, *stay):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "inside.txt").symlink_to("merges.txt")
    (source / "outside.txt").symlink_to(tmp_path / "secret")
    (source / "folder").symlink_to(tmp_path)
    (source / "loop").symlink_to("loop")
    summary = convert(source, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*kept, "inside.txt", "config.json", "hf_quant_config.json", "model.safetensors"}
    assert set(summary.copied) == {*kept, "inside.txt"}
    assert not (tmp_path / "out" / "inside.txt").is_symlink()
    assert "links that lead out of the folder were not followed: folder, outside.txt" in summary.notes


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path: Path) -> None:
    made = save(tmp_path / "made", {"a.weight": torch.randn(64, 64)}, {"hidden_size": 64})
    (made / "tokenizer.json").write_text("{}")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    summary = convert(snapshot, tmp_path / "out")
    assert summary.copied == ("tokenizer.json",)
    assert list(open_checkpoint(tmp_path / "out")) == ["a"]
