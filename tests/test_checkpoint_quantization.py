"""A checkpoint of floats becomes one of MXFP8: which layers, with which values, and what is checked afterwards."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from checkpoints import SCALES, assert_holds, quantization_config, save, tensors_in, weights_by_name
from torch import Tensor

from mxfp8_ops import reference
from mxfp8_ops.checkpoint import CheckpointError, Mismatch, convert
from mxfp8_ops.checkpoint.converting import rounding, writing
from mxfp8_ops.checkpoint.converting.linears import by_names
from mxfp8_ops.checkpoint.converting.summary import Row, Summary
from mxfp8_ops.checkpoint.formats import WRITABLE

# --- floats to MXFP8 -----------------------------------------------------------------------------------------

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
    assert_holds(tmp_path / "out", {**tensors_in(tmp_path / "out"), "a.weight": codes, "a.weight_scale": scale})


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
