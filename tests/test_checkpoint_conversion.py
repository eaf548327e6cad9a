"""What becomes of each tensor of a checkpoint: every format into every other, into MXFP8 and out of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dialects import (
    BLOCK_ROWS,
    EXPERTS,
    WRITERS,
    Content,
    block_constant,
    padded,
    ragged,
    random_content,
    with_kv_scales,
)
from helpers import assert_same, expected_from_float64
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp8_ops import reference
from mxfp8_ops.checkpoint import Checkpoint, CheckpointError, Mismatch, convert, open_checkpoint
from mxfp8_ops.checkpoint.converting import rounding, writing
from mxfp8_ops.checkpoint.converting.linears import Linears, by_names
from mxfp8_ops.checkpoint.converting.plan import Options, plan
from mxfp8_ops.checkpoint.converting.summary import Row, Summary
from mxfp8_ops.checkpoint.formats import WRITABLE

SCALES = {
    "modelopt": (".weight_scale", "_weight_scale"),
    "mxfp8": (".weight_scale_inv", "_scale_inv"),
    "fp8-1x32": (".weight_scale_inv", "_scale_inv"),
    "compressed-tensors": (".weight_scale", None),
}
"""Of a module, and of experts in one tensor."""


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint, as any reader of safetensors finds it."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


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


def assert_holds(folder: Path, expected: dict[str, Tensor]) -> None:
    found = tensors(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(found[name], tensor)


def source_of(tmp_path: Path, writer: str, content: Content, **options: Any) -> tuple[Path, Content]:
    """A checkpoint, and what it says as ``open_checkpoint`` gives it."""
    if writer == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    if "fp8" in writer:
        pytest.importorskip("transformers")
    if writer in BLOCK_ROWS:
        content = block_constant(content, BLOCK_ROWS[writer])
    folder = WRITERS[writer](tmp_path / writer, content, **options)
    if writer.startswith("comfyui"):
        content = padded(content, rows=32)
    if writer == "modelslim":
        for layer in content.layers.values():
            layer.bias = None if layer.bias is None else layer.bias.float()
    return folder, content


# --- MXFP8 to MXFP8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_codes_and_scales_of_every_format_stay_bit_for_bit_in_every_other(tmp_path: Path, writer: str) -> None:
    shards = 1 if writer.startswith("comfyui") else 2
    source, content = source_of(tmp_path, writer, random_content(nan_codes=True), shards=shards)
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
    source, content = source_of(tmp_path, writer, random_content(layers=layers))
    for format in ("modelopt", "mxfp8", "fp8-1x32"):
        convert(source, tmp_path / f"to {format}", format, verify=True)
        assert_holds(tmp_path / f"to {format}", on_disk(content, format))
    with pytest.raises(CheckpointError, match=r"_proj.* holds experts in one tensor, of which compressed-tensors"):
        convert(source, tmp_path / "none", "compressed-tensors")
    assert not (tmp_path / "none").exists()
    convert(source, tmp_path / "dense", "unquantized")
    for name, layer in content.layers.items():
        assert_same(tensors(tmp_path / "dense")[name], reference.dequant(layer.weight, layer.scale))


def test_a_layer_whose_k_a_format_cannot_say_is_dequantized_and_named(tmp_path: Path) -> None:
    content = ragged(random_content(scale_bytes=range(100, 150)))
    source, _ = source_of(tmp_path, "modelslim", content)
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
    found = tensors(tmp_path / "out")
    for name, layer in content.layers.items():
        filled = padded(content).layers[name]
        expected = reference.dequant(filled.weight, filled.scale)[:, : layer.weight.shape[1]].contiguous()
        assert_same(found[f"{name}.weight"], expected)
    assert_same(found["whole.weight"], whole.layers["whole"].weight)
    assert set(content.layers) | {"lm_head"} == set(quantization_config(tmp_path / "out")["ignore"])


def test_what_described_the_old_format_does_not_come_along(tmp_path: Path) -> None:
    for writer in ("modelslim", "auto-round", "comfyui", "torchao", "modelopt-hf-quant-config"):
        source, _ = source_of(tmp_path, writer, random_content())
        target = tmp_path / f"from {writer}"
        convert(source, target, "mxfp8")
        files = {path.name for path in target.iterdir()}
        assert files == {"config.json", "model.safetensors"}, writer
        assert not any("comfy" in name for name in tensors(target))
        assert set(quantization_config(target)) == {
            "quant_method", "activation_scheme", "weight_block_size", "scale_fmt", "ignored_layers",
            "modules_to_not_convert",
        }  # fmt: skip


def test_a_file_without_config_gets_one_with_the_quantization_alone(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path, "comfyui", random_content())
    (source / "another model.txt").touch()
    convert(source / "model_mxfp8.safetensors", tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())) == {"quantization_config"}
    assert not (tmp_path / "out" / "another model.txt").exists()
    convert(source / "model_mxfp8.safetensors", tmp_path / "dense", "unquantized")
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {"model.safetensors"}


def test_modelopt_has_its_older_file_as_well_and_both_agree(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path, "quark", random_content())
    convert(source, tmp_path / "out")
    older = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert older["exclude_modules"] == quantization_config(tmp_path / "out")["ignore"] == ["lm_head"]
    assert (older["quant_algo"], older["group_size"]) == ("MXFP8", 32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert len(open_checkpoint(tmp_path / "out")) == 3


def test_scales_of_a_cache_come_along_and_are_named(tmp_path: Path) -> None:
    source, content = source_of(tmp_path, "modelopt", with_kv_scales(random_content()))
    summary = convert(source, tmp_path / "out", "fp8-1x32")
    assert_holds(tmp_path / "out", on_disk(content, "fp8-1x32"))
    assert "scales of activations, model.layers.0.self_attn.k_proj.k_scale" in str(summary)


def test_options_of_quantization_are_refused_for_what_is_quantized(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path, "quark", random_content())
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
    source, content = source_of(tmp_path, writer, content)
    summary = convert(source, tmp_path / "out", "unquantized", dtype=dtype, verify=True)
    expected = dict(content.plain)
    for name, layer in content.layers.items():
        whole = padded(content).layers[name]
        dense = expected_from_float64(whole.weight, whole.scale, dtype)
        expected[f"{name}.weight"] = dense[:, : layer.weight.shape[1]].contiguous()
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
    source, _ = source_of(tmp_path, "mxfp8", content)
    summary = convert(source, tmp_path / "out", "unquantized", dtype=torch.float16)
    rows = {row.name: row for row in summary.layers}
    assert (rows["exact"].snr_db, rows["exact"].not_finite) == (None, 0)
    layer, dense = content.layers["rounded"], tensors(tmp_path / "out")["rounded.weight"].double()
    exact = reference.dequant(layer.weight, layer.scale, torch.float32).double()
    expected = 10 * math.log10(float(exact.square().sum() / (exact - dense).square().sum()))
    assert rows["rounded"].snr_db == pytest.approx(expected, rel=1e-9)
    assert rows["too large"].not_finite > 3000
    assert f"too large: {rows['too large'].not_finite} elements are inf or NaN" in str(summary)


def test_without_a_dtype_it_is_that_of_the_config(tmp_path: Path) -> None:
    content = random_content()
    content.config["dtype"] = "float16"
    source, _ = source_of(tmp_path, "quark", content)
    convert(source, tmp_path / "out", "unquantized")
    assert tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].dtype == torch.float16


# --- floats to MXFP8 -----------------------------------------------------------------------------------------


def save(folder: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_by_name() -> dict[str, Tensor]:
    """No architecture that anybody knows; every dtype that can be quantized."""
    return {
        "layers.0.up.weight": torch.randn(96, 64).bfloat16(),
        "layers.0.up.bias": torch.randn(96).bfloat16(),
        "layers.0.down.weight": torch.randn(64, 96).half(),
        "layers.1.up.weight": torch.randn(7, 320) * torch.logspace(-20, 20, 7)[:, None],
        "layers.1.odd.weight": torch.randn(64, 40),
        "layers.1.gate.weight": torch.randn(8, 64),
        "layers.1.counts.weight": torch.ones(8, 64, dtype=torch.int64),
        "layers.1.wide.weight": torch.randn(8, 64).double(),
        "mlp.experts.gate_up_proj": torch.randn(2, 64, 64),
        "conv.weight": torch.randn(8, 3, 3, 32),
        "tok_embeddings.weight": torch.randn(16, 64),
        "norm.weight": torch.randn(64),
        "lm_head.weight": torch.randn(16, 64),
        "in_proj_weight": torch.randn(64, 64),
    }


QUANTIZED_BY_NAME = ["layers.0.up", "layers.0.down", "layers.1.up"]
LEFT_BY_NAME = {
    "layers.1.odd": "K = 40 is not a multiple of 32",
    "layers.1.gate": "a router of experts",
    "layers.1.counts": "I64 is not F32, BF16, F16",
    "layers.1.wide": "F64 is not F32, BF16, F16",
    "mlp.experts.gate_up_proj": "experts in one tensor, of which nobody says along which dimension K runs",
    "tok_embeddings": "an embedding, by its name",
    "lm_head": "it computes the output",
}


@pytest.mark.parametrize("rule", [None, "floor"])
@pytest.mark.parametrize("format", WRITABLE)
def test_linears_are_quantized_as_the_reference_does_it_and_all_else_stays(
    tmp_path: Path, format: str, rule: str | None
) -> None:
    weights = weights_by_name()
    summary = convert(save(tmp_path / "in", weights), tmp_path / "out", format, rule, verify=True)
    expected = {name: tensor for name, tensor in weights.items() if name[:-7] not in QUANTIZED_BY_NAME}
    for layer in QUANTIZED_BY_NAME:
        codes, scale = reference.quantize(weights[f"{layer}.weight"], rule or "rceil")
        expected |= {f"{layer}.weight": codes, f"{layer}{SCALES[format][0]}": scale}
    assert_holds(tmp_path / "out", expected)
    assert {row.name: row.reason for row in summary.layers if row.action == "left"} == LEFT_BY_NAME
    assert [row.name for row in summary.layers if row.action == "quantized"] == sorted(QUANTIZED_BY_NAME, reverse=True)
    assert "linears were told by their names (config.json names no architecture)" in summary.notes
    said = quantization_config(tmp_path / "out")
    left = {*LEFT_BY_NAME, "mlp.experts"} - {"mlp.experts.gate_up_proj"}
    assert set(said.get("ignore") or said["modules_to_not_convert"]) == left - {"tok_embeddings"}


def test_snr_is_the_ratio_of_squares_in_decibels(tmp_path: Path) -> None:
    weights = weights_by_name()
    for rule in ("rceil", "floor"):
        summary = convert(save(tmp_path / f"in {rule}", weights), tmp_path / rule, rule=rule)
        for row in summary.layers:
            if row.action == "quantized":
                weight = weights[f"{row.name}.weight"]
                error = weight.double() - reference.dequant(*reference.quantize(weight, rule), torch.float32).double()
                expected = 10 * math.log10(float(weight.double().square().sum() / error.square().sum()))
                assert row.snr_db == pytest.approx(expected, rel=1e-9)
                assert 25 < row.snr_db < 35
                assert row.bytes_before == weight.nbytes
                assert row.bytes_after == weight.numel() * 33 / 32


def test_a_weight_with_inf_or_nan_is_named(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64), "zero.weight": torch.zeros(64, 64)}
    weights["a.weight"][3, 40] = math.inf
    weights["a.weight"][5, 1] = math.nan
    summary = convert(save(tmp_path / "in", weights), tmp_path / "out", verify=True)
    assert {row.name: row.not_finite for row in summary.rows} == {"a": 64, "b": 0, "zero": 0}
    assert "a: 64 elements are inf or NaN" in str(summary)
    assert [row.snr_db is None for row in summary.rows] == [False, False, True]
    codes, scale = reference.quantize(weights["a.weight"])
    assert_holds(tmp_path / "out", {**tensors(tmp_path / "out"), "a.weight": codes, "a.weight_scale": scale})


def test_ignore_and_only_choose_layers_and_say_when_they_match_none(tmp_path: Path) -> None:
    source = save(tmp_path / "in", weights_by_name())
    summary = convert(source, tmp_path / "out", ignore=["*.down", "typo*"], only=["layers.0.*", "lm_head"])
    assert [row.name for row in summary.layers if row.action == "quantized"] == ["layers.0.up"]
    reasons = {row.name: row.reason for row in summary.layers}
    assert reasons["layers.0.down"] == "ignored on request"
    assert reasons["layers.1.up"] == "not among those asked for"
    assert reasons["lm_head"] == "it computes the output"
    assert "no layer matches what is ignored: typo*" in summary.notes
    assert {"layers.0.down", "layers.1.up"} <= set(quantization_config(tmp_path / "out")["ignore"])
    with pytest.raises(CheckpointError, match=r"no layer would be MXFP8: .*layers\.0\.up: not among those asked for"):
        convert(source, tmp_path / "none", only=["nothing"])


def test_what_is_not_quantized_cannot_be_dequantized(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized: there is nothing to dequantize"):
        convert(save(tmp_path / "in", weights_by_name()), tmp_path / "out", "unquantized")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.3.self_attn.q_proj", ""),
        ("model.layers.3.mlp.gate_proj", ""),
        ("model.layers.3.mlp.experts.7.w1", ""),
        ("encoder.layer.0.output.dense", ""),
        ("bert.pooler.dense", ""),
        ("model.embed_tokens", "an embedding, by its name"),
        ("transformer.wte", "an embedding, by its name"),
        ("shared", "an embedding, by its name"),
        ("block.0.layer.0.SelfAttention.relative_attention_bias", "an embedding, by its name"),
        ("visual.norm1.linear", "a norm, by its name"),
        ("transformer.h.0.attn.c_attn", "perhaps a Conv1D, [K, N], by its name"),
        ("model.layers.3.mlp.gate", "a router of experts"),
        ("model.layers.3.block_sparse_moe.router.layer", "a router of experts"),
        ("model.layers.3.mlp.shared_expert_gate", "a router of experts"),
        ("language_model.lm_head", "it computes the output"),
        ("classifier", "it computes the output"),
    ],
)
def test_names_tell_linears_where_nothing_else_does(name: str, reason: str) -> None:
    assert by_names("").why_not(name) == reason


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


# --- verification --------------------------------------------------------------------------------------------


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    return save(tmp_path / "in", {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64), "c": torch.ones(3)})


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_byte_that_changes_on_the_way_is_found(floats: Path, tmp_path: Path, monkeypatch, victim: int) -> None:
    original, calls = writing._bytes, iter(range(99))

    def changed(tensor: Tensor) -> memoryview:
        data = bytearray(original(tensor))
        if next(calls) == victim:
            data[1] ^= 1
        return memoryview(data)

    name = ("c", "a.weight", "a.weight")[victim]
    monkeypatch.setattr(writing, "_bytes", changed)
    with pytest.raises(
        Mismatch, match=rf"1 of 3 were not written as they should be: {name} \(.* elements are|the values"
    ):
        convert(floats, tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_rule_that_rounds_too_far_is_found(floats: Path, tmp_path: Path, monkeypatch) -> None:
    def coarse(weight: Tensor, rule: str) -> tuple[Tensor, Tensor]:
        _, scale = reference.quantize(weight, rule)
        return (weight / reference.scale_to_float32(scale + 4).repeat_interleave(32, -1)).to(
            torch.float8_e4m3fn
        ), scale + 4

    monkeypatch.setattr(rounding.functional, "quantize", coarse)
    with pytest.raises(Mismatch, match=r"a\.weight \(\d+ elements are further off than rounding allows\)"):
        convert(floats, tmp_path / "out", verify=True)


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_rounding_stays_within_what_verification_allows(rule: str) -> None:
    weight = torch.cat([torch.randn(64, 64) * 2.0**power for power in range(-149, 128, 3)])
    weight = torch.cat([weight, torch.linspace(440, 1024, 4096).view(64, 64), torch.zeros(1, 64)])
    codes, scale = reference.quantize(weight, rule)
    assert rounding.beyond(weight, codes, scale, rule) == 0
    nearly = codes.view(torch.uint8).clone()
    nearly[:, ::2] ^= 2  # two values further
    assert rounding.beyond(weight, nearly.view(codes.dtype), scale, rule) > weight.numel() / 4
    smaller = (scale.int() - 1).clamp(min=0).to(scale.dtype)
    assert rounding.beyond(weight, codes, smaller, rule) > weight.numel() / 2


def test_an_output_that_reads_otherwise_is_found_without_verify(floats: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        WRITABLE["modelopt"], "documents", classmethod(lambda cls, left: {"quant_model_description.json": {}})
    )
    monkeypatch.setattr(WRITABLE["modelopt"], "config", classmethod(lambda cls, left: WRITABLE["mxfp8"].config(left)))
    monkeypatch.setattr("mxfp8_ops.checkpoint.converting.converter.check_says", lambda *args: None)
    with pytest.raises(Mismatch, match="what was written cannot be read again: "):
        convert(floats, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the summary, arguments ----------------------------------------------------------------------------------


def test_the_summary_of_a_great_many_layers_shows_the_worst() -> None:
    rows = [Row(f"layers.{i}", (8, 32), "quantized", "", 512, 264, snr_db=30 + i / 1000) for i in range(1000)]
    rows.append(Row("head", (8, 32), "left", "it computes the output", 512, 512))
    text = str(
        Summary(
            "in", "out", "unquantized", "modelopt", "rceil", tuple(rows), (), ("model.safetensors",), 0, (), False, 1
        )
    )
    assert "layers.19 " in text
    assert "layers.20 " not in text
    assert "it computes the output" in text
    assert "of 1001 layers those of lowest SNR" in text
    assert "quantized: 1000 layers, 512.00 kB -> 264.00 kB" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"format": "quark"},
            ValueError,
            "unknown format 'quark': use one of modelopt, mxfp8, fp8-1x32, compressed-tens",
        ),
        ({"rule": "ceil"}, ValueError, "unknown quantization rule 'ceil'"),
        ({"dtype": torch.bfloat16}, ValueError, "is that of unquantized weights, and the format is modelopt"),
        (
            {"format": "unquantized", "dtype": torch.float8_e4m3fn},
            TypeError,
            "dtype must be float32, bfloat16 or float16",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(floats: Path, tmp_path: Path, options, error, message) -> None:
    with pytest.raises(error, match=message):
        convert(floats, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_two_tensors_of_one_name_are_an_error(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(64, 64), "a.weight_scale": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"two tensors would be called a\.weight_scale"):
        convert(save(tmp_path / "in", weights), tmp_path / "out")


def test_linears_are_not_looked_for_in_what_is_quantized(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path, "quark", random_content())

    def never() -> Linears:
        raise AssertionError

    checkpoint: Checkpoint = open_checkpoint(source)
    assert plan(checkpoint, Options(WRITABLE["mxfp8"]), never).unquantized == ["lm_head"]
