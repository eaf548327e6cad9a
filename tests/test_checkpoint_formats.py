"""Reading of every format: bit for bit what was written, and nothing that only looks like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, assert_opens_as, edit_config, edit_json, made, small
from dialects import (
    EXPERTS,
    STACKED_EXPERTS,
    WRITERS,
    Content,
    per_expert,
    ragged,
    random_content,
    swizzled,
    with_kv_scales,
)
from helpers import assert_same

from mxfp8_ops import reference
from mxfp8_ops.checkpoint import CheckpointError, open_checkpoint
from mxfp8_ops.checkpoint.layouts import RowMajor, SharedByRows, Swizzled

ONE_FILE = [name for name in WRITERS if "comfyui" in name]
SHARDED = [(name, shards) for name in WRITERS for shards in (1, 3) if shards == 1 or name not in ONE_FILE]
TILES = {"torchao-swizzled", "torchao-swizzle-type"}  # experts of whole tiles only
Q, K = SMALL


@pytest.mark.parametrize(("name", "shards"), SHARDED)
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, name: str, shards: int) -> None:
    path, content = made(tmp_path, name, random_content(nan_codes=True, scale_bytes=range(256)), shards)
    checkpoint = assert_opens_as(path, content)
    family = name.removesuffix("-transformers") if name.startswith("mxfp8") else name
    assert family.startswith(checkpoint.format.name) or name == "modelopt-mixed"


@pytest.mark.parametrize("name", sorted(STACKED_EXPERTS))
def test_experts_in_one_tensor_are_one_layer(tmp_path: Path, name: str) -> None:
    layers = {key: shape for key, shape in EXPERTS.items() if name not in TILES or shape[1] % 128 == 0}
    path, content = made(tmp_path, name, random_content(layers=layers), shards=3)
    checkpoint = assert_opens_as(path, content)
    assert all(checkpoint[layer].weight.dim() == 3 for layer in layers)


@pytest.mark.parametrize("name", WRITERS)
def test_experts_of_one_tensor_each_are_layers_each(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, per_expert(random_content(layers=EXPERTS)))
    checkpoint = assert_opens_as(path, content)
    assert len(checkpoint) == 6
    gate, up = (f"model.layers.0.mlp.experts.1.{part}_proj" for part in ("gate", "up"))
    fused = checkpoint.fused([gate, up])
    assert_same(
        fused.weight,
        torch.cat([content.layers[each].weight.view(torch.uint8) for each in (gate, up)]).view(torch.float8_e4m3fn),
    )


@pytest.mark.parametrize("name", WRITERS)
def test_fused_layers_are_the_concatenation_of_their_values(tmp_path: Path, name: str) -> None:
    content = random_content(layers=SMALL, scale_bytes=range(100, 150))
    content.layers[K].bias = torch.arange(32).bfloat16()
    path, content = made(tmp_path, name, content)
    checkpoint = open_checkpoint(path)
    fused = checkpoint.fused([Q, K, Q])
    parts = [content.layers[each] for each in (Q, K, Q)]
    assert_same(
        reference.dequant(fused.weight, fused.scale),
        torch.cat([reference.dequant(part.weight, part.scale) for part in parts]),
    )
    assert fused.bias is not None
    assert_same(fused.bias, torch.cat([part.bias for part in parts if part.bias is not None]))


def test_layers_that_cannot_be_fused_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made(tmp_path, "mxfp8")[0])
    down, k, q = sorted(checkpoint)
    with pytest.raises(
        ValueError, match=r"different K cannot be fused: .*q_proj \[96, 128\], .*down_proj \[128, 160\]"
    ):
        checkpoint.fused([q, down])
    with pytest.raises(ValueError, match=r"with and without a bias cannot be fused: .*q_proj, .*k_proj"):
        checkpoint.fused([q, k])
    with pytest.raises(KeyError, match="no MXFP8 layer 'lm_head'"):
        checkpoint.fused([k, "lm_head"])


@pytest.mark.parametrize("name", [*WRITERS, "ragged"])
def test_any_rows_and_blocks_are_those_of_the_whole(tmp_path: Path, name: str) -> None:
    content = ragged(random_content()) if name == "ragged" else None
    path, _ = made(tmp_path, "modelslim" if name == "ragged" else name, content)
    checkpoint = open_checkpoint(path)
    for layer, source in checkpoint.sources.items():
        weight, scale, _ = checkpoint[layer]
        for rows, columns in ((slice(0, 8), slice(0, 32)), (slice(7, 39), slice(32, 96)), (slice(1, 3), slice(None))):
            part, part_scale = source.read_weight(checkpoint.files, rows, columns)
            assert_same(part, weight[rows, columns])
            blocks = slice(None) if columns == slice(None) else slice(columns.start // 32, columns.stop // 32)
            assert_same(part_scale, scale[rows, blocks])


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    path, content = small(tmp_path)
    checkpoint = open_checkpoint(path)
    (path / "model.safetensors").unlink()
    assert Q in checkpoint
    assert "lm_head" not in checkpoint
    assert checkpoint.keys() == content.layers.keys()
    assert "mxfp8): 2 MXFP8 layers, 3 other tensors" in repr(checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*q_proj\.weight cannot be read"):
        checkpoint[Q]


# --- layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 31, 32, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 9])
def test_unswizzling_is_the_inverse_of_swizzling_in_every_shape(n: int, columns: int) -> None:
    scale = torch.arange(n * columns).remainder(251).to(torch.uint8).view(n, columns)
    for k in (columns * 32, columns * 32 - 5):
        for shape in Swizzled().stored_shapes((n, k)):
            assert_same(Swizzled().to_rows(swizzled(scale).view(shape), (n, k)), scale)


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 32, 128, 10**18])
def test_rows_of_a_block_share_its_scales(rows: int) -> None:
    layout = SharedByRows(rows)
    for n in range(1, 70):
        (stored,) = layout.stored_shapes((n, 96))
        assert stored == (-(-n // rows), 3)
        scale = torch.arange(stored[0] * 3, dtype=torch.uint8).view(stored)
        assert_same(layout.to_rows(scale, (n, 96)), torch.stack([scale[row // rows] for row in range(n)]))


def test_row_major_scales_have_a_short_last_block() -> None:
    assert RowMajor().stored_shapes((2, 7, 33)) == ((2, 7, 2),)


# --- configs that say the same -------------------------------------------------------------------------


def modelopt_moved_inside(folder: Path) -> None:
    older = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    said = {"quant_method": "modelopt", "quantization": older}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=said))


def modelopt_without_a_size(folder: Path) -> None:
    edit_json(folder / "hf_quant_config.json", lambda each: each["quantization"].update(group_size=None))


def quark_by_layer(folder: Path, *patterns: str) -> None:
    said = json.loads((folder / "config.json").read_text())["quantization_config"]["global_quant_config"]
    other = {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}
    edit_config(folder, layer_quant_config=dict.fromkeys(patterns, said), global_quant_config=other)


WEIGHTS = {"num_bits": 8, "type": "float", "group_size": 32}
SAME: dict[str, tuple[str, Any]] = {
    "modelopt: nested in config.json": ("modelopt", modelopt_moved_inside),
    "modelopt: lower case": ("modelopt", lambda folder: edit_config(folder, quant_algo="mxfp8")),
    "modelopt: no size of groups": ("modelopt-hf-quant-config", modelopt_without_a_size),
    "modelopt: kv cache": ("modelopt", lambda folder: edit_config(folder, kv_cache_scheme={"num_bits": 8})),
    "mxfp8: no block size, no scale_fmt": (
        "mxfp8",
        lambda folder: edit_config(folder, weight_block_size=None, scale_fmt=None),
    ),
    "mxfp8: diffusers of vLLM-omni": ("mxfp8", lambda folder: edit_config(folder, is_checkpoint_mxfp8_serialized=True)),
    "fp8: no scale_fmt, but scales of bytes": ("fp8-1x32", lambda folder: edit_config(folder, scale_fmt=None)),
    "compressed-tensors: mixed": (
        "compressed-tensors",
        lambda folder: edit_config(
            folder,
            format="mixed-precision",
            config_groups={"group_0": {"targets": ["Linear"], "format": "mxfp8-quantized", "weights": WEIGHTS}},
        ),
    ),
    "auto-round: RCEIL": ("auto-round", lambda folder: edit_config(folder, data_type="mx_fp_rceil")),
    "auto-round: with the bits": ("auto-round", lambda folder: edit_config(folder, data_type="mx_fp8")),
    "auto-round: with the dtype": ("auto-round", lambda folder: edit_config(folder, data_type="mx_fp8e4m3")),
    "auto-round: INC": ("auto-round", lambda folder: edit_config(folder, quant_method="inc")),
    "quark: by wildcard": ("quark", lambda folder: quark_by_layer(folder, "model.layers.*.self_attn.*")),
    "quark: by regex": ("quark", lambda folder: quark_by_layer(folder, r"re:model\.layers\.\d+\.self_attn\.[qk]_proj")),
    "quark: by name": ("quark-per-block", lambda folder: quark_by_layer(folder, Q, K)),
}


@pytest.mark.parametrize("case", SAME)
def test_other_words_for_the_same_are_understood(tmp_path: Path, case: str) -> None:
    name, edit = SAME[case]
    path, content = small(tmp_path, name)
    edit(path)
    assert_opens_as(path, content)


@pytest.mark.parametrize("name", ["modelopt", "modelopt-hf-quant-config", "modelopt-mixed"])
def test_scales_of_the_kv_cache_are_plain_tensors(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, with_kv_scales(random_content()))
    assert "model.layers.0.self_attn.k_proj.k_scale" in assert_opens_as(path, content).plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoint_without_quantization_has_no_layers(tmp_path: Path, dtype: torch.dtype) -> None:
    content = Content({}, {"a.weight": torch.randn(3, 5).to(dtype), "ids": torch.arange(4)}, {"dtype": "float16"})
    path, _ = made(tmp_path, "modelopt-hf-quant-config", content)
    (path / "hf_quant_config.json").unlink()
    checkpoint = assert_opens_as(path, content)
    assert checkpoint.format.name == "unquantized"
    assert checkpoint.dtype == torch.float16


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"text_config": {"dtype": "float16"}}, torch.float16),
        ({"text_config": "none", "dtype": ["float16"]}, torch.bfloat16),
        ({"dtype": "uint8"}, torch.bfloat16),
        ({"dtype": "nn", "text_config": None}, torch.bfloat16),
    ],
)
def test_the_dtype_is_what_config_json_says(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    path, _ = small(tmp_path)
    edit_json(path / "config.json", lambda each: each.update(config))
    assert open_checkpoint(path).dtype == dtype
