"""Traps of MXFP8 on disk, one by one: what the naive way makes of a checkpoint is wrong, what is read here is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL, edit_config, edit_json, made, small
from dialects import WRITERS, Content, Layer, ragged, random_content, with_fp8_layer
from helpers import assert_same, element_values, float64_values
from safetensors.torch import load_file
from torch import Tensor

from mxfp8_ops import reference
from mxfp8_ops.checkpoint import CheckpointError, open_checkpoint

Q, K = SMALL
FILE = "model.safetensors"
TILE = {Q: (128, 128), K: (256, 256)}  # whole tiles of swizzled scales: the same shape either way


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of one file, as safetensors gives it."""
    (file,) = path.glob("*.safetensors")
    return load_file(file)


def values(weight: Tensor, factors: Tensor) -> Tensor:
    """float64 products of elements and any float64 factors of blocks of 32."""
    return element_values()[weight.view(torch.uint8).long()] * factors.repeat_interleave(32, -1)


def assert_read_right(path: Path, content: Content) -> None:
    checkpoint = open_checkpoint(path)
    for name, layer in content.layers.items():
        weight, scale, _ = checkpoint[name]
        assert_same(float64_values(weight, scale), float64_values(layer.weight, layer.scale))


def wrong(actual: Tensor, layer: Layer) -> bool:
    return not actual.equal(float64_values(layer.weight, layer.scale))


# --- scales as numbers ---------------------------------------------------------------------------------


def every_byte() -> Content:
    """A layer whose scales have all bytes but the NaN, 32 columns each."""
    content = random_content(layers={Q: (255, 64)}, scale_bytes=range(255))
    content.layers[Q].scale = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 2)
    return content


@pytest.mark.parametrize(
    "name", [name for name in WRITERS if "e8m0" in name or "transformers" in name or name == "torchao"]
)
def test_e8m0_is_viewed_as_bytes_and_never_cast(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, every_byte())
    (scale,) = [each for each in stored(path).values() if each.dtype == torch.float8_e8m0fnu]
    true = content.layers[Q].scale
    buffer = torch.full_like(true, 9).copy_(scale)  # what load_state_dict does with a buffer of bytes
    assert not scale.to(torch.uint8).equal(true)
    assert not buffer.equal(true)
    assert not buffer[true < 127].any()  # all scales below 1 are gone
    assert_same(open_checkpoint(path)[Q].scale, true)


@pytest.mark.parametrize("name", ["modelopt", "mxfp8", "compressed-tensors", "auto-round", "quark", "modelslim"])
def test_a_byte_is_an_exponent_and_not_a_number(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, random_content(layers=SMALL, scale_bytes=range(108, 114)))
    tensors, layer = stored(path), content.layers[Q]
    scale = next(each for key, each in tensors.items() if key.startswith(f"{Q}.weight_scale"))
    naive = values(tensors[f"{Q}.weight"], scale.double())
    assert wrong(naive, layer)
    ratio = (naive / float64_values(layer.weight, layer.scale)).nan_to_num()
    assert ratio.max() > 450_000  # and no error
    assert_read_right(path, content)


@pytest.mark.parametrize(
    "name", [name for name in WRITERS if name.startswith(("mxfp8", "fp8")) and name != "fp8-32x32-scale"]
)
def test_scale_inv_is_multiplied_in_spite_of_its_name(tmp_path: Path, name: str) -> None:
    path, content = small(tmp_path, name)
    tensors, layer = stored(path), content.layers[Q]
    assert f"{Q}.weight_scale_inv" in tensors
    assert wrong(values(layer.weight, torch.exp2(127 - layer.scale.double())), layer)
    assert not wrong(values(layer.weight, torch.exp2(layer.scale.double() - 127)), layer)
    assert_read_right(path, content)


def test_scales_are_kept_and_not_derived_again(tmp_path: Path) -> None:
    """Writers choose scales by different rules: another rule would give other bytes for the same values."""
    path, content = small(tmp_path, "modelopt")
    layer, read = content.layers[Q], open_checkpoint(path)[Q]
    _, derived = reference.quantize(reference.dequant(layer.weight, layer.scale, torch.float32))
    assert not derived.equal(layer.scale)
    assert_same(read.scale, layer.scale)
    assert_same(read.weight, layer.weight)


# --- where a scale is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["comfyui", "comfyui-metadata"])
def test_a_swizzle_that_the_shape_does_not_show_is_undone(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, random_content(layers=TILE))
    tensors = stored(path)
    for key, layer in content.layers.items():
        scale = tensors[f"{key}.weight_scale"].view(torch.uint8)
        assert scale.shape == layer.scale.shape  # it looks as if it were not swizzled
        assert wrong(values(layer.weight, torch.exp2(scale.double() - 127)), layer)
    assert_read_right(path, content)


@pytest.mark.parametrize("name", ["torchao", "torchao-swizzled", "torchao-swizzle-type"])
def test_the_swizzle_of_torchao_is_the_weights_own(tmp_path: Path, name: str) -> None:
    """The activations have the same attribute, and theirs is always on."""
    path, content = made(tmp_path, name, random_content(layers=TILE))
    swizzled = name != "torchao"
    scale = stored(path)[f"{Q}._weight_scale"].view(torch.uint8)
    assert scale.reshape(content.layers[Q].scale.shape).equal(content.layers[Q].scale) != swizzled
    assert_read_right(path, content)


@pytest.mark.parametrize("name", ["fp8-32x32", "fp8-32x32-u8", "fp8-32x32-scale", "quark-per-block"])
def test_each_scale_of_a_square_block_is_for_32_neighbours(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, random_content(layers={Q: (72, 96)}))  # the last block has 8 rows
    layer = content.layers[Q]
    (scale,) = [
        each.view(torch.uint8) for key, each in stored(path).items() if key.startswith(f"{Q}.") and "scale" in key
    ]
    assert scale.shape == (3, 3)
    assert not scale.repeat(32, 1)[:72].equal(layer.scale)  # block by block instead of row by row
    assert_read_right(path, content)


def test_a_short_last_block_keeps_its_scale(tmp_path: Path) -> None:
    cut = ragged(random_content(layers={Q: (8, 96)}))
    path, content = made(tmp_path, "modelslim", cut)
    tensors, k = stored(path), 76
    weight, scale = tensors[f"{Q}.weight"], tensors[f"{Q}.weight_scale"]
    assert (weight.shape, scale.shape) == ((8, k), (8, 3))
    one_stream = (
        scale.flatten().repeat_interleave(32)[: weight.numel()].view(8, k)
    )  # blocks that run on into the next row
    layer = content.layers[Q]
    expected = float64_values(layer.weight, layer.scale)
    assert not values_of_rows(weight, one_stream).equal(expected[:, :k])
    whole_blocks = torch.nn.functional.pad(scale[:, : k // 32].repeat_interleave(32, -1), (0, k - 64), value=127)
    assert not values_of_rows(weight, whole_blocks).equal(expected[:, :k])  # the last ones without a scale
    read = open_checkpoint(path)[Q]
    assert_same(float64_values(read.weight, read.scale)[:, :k], expected[:, :k])
    assert not float64_values(read.weight, read.scale)[:, k:].any()


def values_of_rows(weight: Tensor, exponents: Tensor) -> Tensor:
    """float64 products of elements and a scale byte for each."""
    return element_values()[weight.view(torch.uint8).long()] * torch.exp2(exponents.double() - 127)


# --- words ---------------------------------------------------------------------------------------------


def test_fp8_is_a_part_of_the_word_mxfp8(tmp_path: Path) -> None:
    """Of FP8 a server that looks for a part of the word makes MXFP8, and the other way round."""
    content = random_content(layers=SMALL)
    fp8 = with_fp8_layer(Content({}, content.plain, content.config, content.unquantized), "x")
    path, _ = made(tmp_path, "modelopt-hf-quant-config", fp8)
    for algorithm in ("FP8", "W4A8_MXFP8_FP8", "MXFP8_AWQ", "XMXFP8"):
        edit_json(
            path / "hf_quant_config.json", lambda each, said=algorithm: each["quantization"].update(quant_algo=said)
        )
        assert "FP8" in algorithm
        with pytest.raises(CheckpointError, match=f"none of modelopt, .*quant_algo '{algorithm}'"):
            open_checkpoint(path)


def test_an_fp8_layer_beside_mxfp8_is_not_read_as_one(tmp_path: Path) -> None:
    """Its elements have the same dtype; its one scale is a float."""
    path, _ = made(tmp_path, "modelopt-mixed", with_fp8_layer(random_content(layers=SMALL), "x.up_proj"))
    assert stored(path)["x.up_proj.weight"].dtype == torch.float8_e4m3fn
    with pytest.raises(CheckpointError, match=r"otherwise than MXFP8 in blocks of 32: x\.up_proj \(FP8"):
        open_checkpoint(path)
    path, _ = made(tmp_path / "not said", "modelopt", with_fp8_layer(random_content(layers=SMALL), "x.up_proj"))
    with pytest.raises(CheckpointError, match=r"x\.up_proj\.weight_scale \(F32 \[\] .*float scales are another format"):
        open_checkpoint(path)


LISTS = [("modelopt", "ignore"), ("mxfp8", "ignored_layers"), ("fp8-1x32", "modules_to_not_convert")]
LISTS += [("compressed-tensors", "ignore"), ("quark", "exclude")]


@pytest.mark.parametrize(("name", "key"), LISTS)
def test_a_name_in_a_list_is_not_a_part_of_another(tmp_path: Path, name: str, key: str) -> None:
    layers = {"a.mlp.gate_proj": (32, 64), "a.11.q_proj": (32, 64)}
    path, content = made(tmp_path, name, random_content(layers=layers))
    ignored = ["a.mlp.gate", "gate", "proj", "a.1", "mlp.gate"]
    assert all(any(each in layer for each in ignored) for layer in layers)  # by parts of words nothing would be MXFP8
    edit_config(path, **{key: ignored})
    if name == "modelopt":
        (path / "hf_quant_config.json").unlink()
    assert_read_right(path, content)


def test_not_everything_that_is_called_scale_is_one(tmp_path: Path) -> None:
    """DeepSeek's scales end like the weights of some norms; a scale has a sibling of FP8."""
    content = random_content(layers=SMALL)
    others = {"a.q_clip.scale": torch.randn(4), "a.q_clip.weight": torch.randn(4), "a.hc.scale": torch.tensor(2.0)}
    others |= {"a.hc_attn_scale": torch.randn(3), "a.input_scale": torch.tensor(1.0), "a.kv.k_scale": torch.tensor(1.0)}
    content.plain |= others
    path, content = made(tmp_path, "fp8-32x32-scale", content)
    assert sum(key.endswith("scale") for key in stored(path)) > len(SMALL)
    assert_read_right(path, content)
    assert set(others) <= set(open_checkpoint(path).plain)


# --- in parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["modelopt", "mxfp8", "fp8-32x32", "compressed-tensors", "torchao-swizzled"])
def test_a_weight_and_its_scale_may_be_in_different_files(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, random_content(layers=SMALL), shards=2)
    weight_map = json.loads(next(path.glob("*.index.json")).read_text())["weight_map"]
    for source in open_checkpoint(path).sources.values():
        assert weight_map[source.weight.name] != weight_map[source.scale.name]
    assert_read_right(path, content)


def test_square_blocks_are_fused_row_by_row(tmp_path: Path) -> None:
    """The scales of 40 rows and of 72, one after the other as they are stored, are not those of 112."""
    content = random_content(layers={Q: (40, 64), K: (72, 64)})
    content.layers[Q].bias = None
    path, content = made(tmp_path, "fp8-32x32", content)
    tensors = stored(path)
    blocks = torch.cat([tensors[f"{each}.weight_scale_inv"].view(torch.uint8) for each in (Q, K)])
    expected = torch.cat([content.layers[each].scale for each in (Q, K)])
    assert not blocks.repeat_interleave(32, 0)[:112].equal(expected)
    assert_same(open_checkpoint(path).fused([Q, K]).scale, expected)
