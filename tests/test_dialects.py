"""The generator of checkpoints: names, types and shapes in the files, values as the formats' own code reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quantization_config, tensors_in
from dialects import (
    BLOCK_ROWS,
    EXPERTS,
    STACKED_EXPERTS,
    WRITERS,
    Content,
    block_constant,
    llama_content,
    padded,
    per_expert,
    ragged,
    random_content,
    swizzled,
    with_fp8_layer,
    with_kv_scales,
)
from helpers import assert_same, expected_from_float64
from safetensors import safe_open

from mxfp8_ops import reference

# variant: names of a linear's weight and scale, the same of experts in one tensor, type and shape of the scale
WEIGHT_SCALE = (".weight", ".weight_scale", "", "_weight_scale", "U8", "[N, K/32]")
SCALE_INV = (".weight", ".weight_scale_inv", "", "_scale_inv")
PARTS = ("._weight_qdata", "._weight_scale", "_qdata", "_scale", "F8_E8M0")
ON_DISK = {
    **dict.fromkeys(("modelopt", "modelopt-hf-quant-config", "modelopt-mixed"), WEIGHT_SCALE),
    **dict.fromkeys(("compressed-tensors", "auto-round", "quark", "modelslim"), WEIGHT_SCALE),
    "mxfp8": (*SCALE_INV, "U8", "[N, K/32]"),
    "mxfp8-transformers": (*SCALE_INV, "F8_E8M0", "[N, K/32]"),
    "fp8-1x32": (*SCALE_INV, "U8", "[N, K/32]"),
    "fp8-1x32-e8m0": (*SCALE_INV, "F8_E8M0", "[N, K/32]"),
    "fp8-32x32": (*SCALE_INV, "F8_E8M0", "[N/32, K/32]"),
    "fp8-32x32-u8": (*SCALE_INV, "U8", "[N/32, K/32]"),
    "fp8-32x32-scale": (".weight", ".scale", None, None, "F8_E8M0", "[N/32, K/32]"),
    "quark-per-block": (".weight", ".weight_scale", None, None, "F8_E8M0", "[N/32, K/32]"),
    "comfyui": (".weight", ".weight_scale", None, None, "F8_E8M0", "padded"),
    "comfyui-metadata": (".weight", ".weight_scale", None, None, "U8", "padded"),
    "torchao": (*PARTS, "[N, K/32]"),
    "torchao-swizzled": (*PARTS, "tiles"),
    "torchao-swizzle-type": (*PARTS, "tiles"),
}


def scale_shape(kind: str, n: int, k: int) -> list[int]:
    return {
        "[N, K/32]": [n, k // 32],
        "[N/32, K/32]": [-(-n // 32), k // 32],
        "padded": [-(-n // 128) * 128, -(-k // 128) * 4],
        "tiles": [-(-n // 128) * 32, -(-k // 128) * 16],
    }[kind]


def written(folder: Path, name: str, content: Content, **options: Any) -> Path:
    """A checkpoint of the variant, of such content as it can say; skips where the tool that writes it is missing."""
    if name == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    if rows := BLOCK_ROWS.get(name):
        content = block_constant(content, rows)
    return WRITERS[name](folder / name, content, **options)


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor in every file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found |= {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    return found


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).bfloat16()


@pytest.mark.parametrize("name", WRITERS)
def test_names_types_and_shapes_are_those_of_the_table(tmp_path: Path, name: str) -> None:
    weight, scale, _, _, dtype, kind = ON_DISK[name]
    content = random_content()
    found = headers(written(tmp_path, name, content))
    for layer_name, layer in content.layers.items():
        n, k = layer.weight.shape
        n = -(-n // 32) * 32 if "comfyui" in name else n
        assert found.pop(layer_name + weight) == ("F8_E4M3", [n, k])
        assert found.pop(layer_name + scale) == (dtype, scale_shape(kind, n, k))
        found.pop(f"{layer_name}.comfy_quant", None)
        if layer.bias is not None:
            assert found.pop(f"{layer_name}.bias") == (
                "F32" if name == "modelslim" else "BF16",
                [layer.weight.shape[0]],
            )
    assert found == {key: ("BF16", list(tensor.shape)) for key, tensor in content.plain.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_experts_are_one_tensor_where_the_format_has_that(tmp_path: Path, name: str) -> None:
    content = random_content(layers=EXPERTS)
    if ON_DISK[name][-1] == "tiles":  # one matrix of all experts: whole tiles only
        with pytest.raises(ValueError, match=r"scales of 2 experts of 64 rows cannot be swizzled"):
            written(tmp_path / "uneven", name, content)
        content = random_content(layers={key: shape for key, shape in EXPERTS.items() if shape[1] % 128 == 0})
    if name not in STACKED_EXPERTS:
        with pytest.raises(ValueError, match="this format knows one linear an expert"):
            written(tmp_path, name, content)
        return
    _, _, weight, scale, dtype, kind = ON_DISK[name]
    found = headers(written(tmp_path, name, content))
    for layer_name, layer in content.layers.items():
        experts, n, k = layer.weight.shape
        parent, leaf = layer_name.rsplit(".", 1)
        stem = f"{parent}._{leaf}" if name.startswith("torchao") else layer_name
        assert found.pop(stem + weight) == ("F8_E4M3", [experts, n, k])
        assert found.pop(stem + scale) == (dtype, [experts, *scale_shape(kind, n, k)])


def test_per_expert_takes_the_halves_of_gate_up_apart() -> None:
    stem = "model.layers.0.mlp.experts"
    content = random_content(layers=EXPERTS)
    split, whole = per_expert(content).layers, content.layers[f"{stem}.gate_up_proj"]
    assert sorted(split) == sorted(f"{stem}.{e}.{part}_proj" for e in range(2) for part in ("gate", "up", "down"))
    assert_same(split[f"{stem}.1.gate_proj"].weight, whole.weight[1, :128])
    assert_same(split[f"{stem}.1.up_proj"].scale, whole.scale[1, 128:])


@pytest.mark.parametrize("name", [name for name in WRITERS if "comfyui" not in name])
def test_shards_separate_weights_from_their_scales(tmp_path: Path, name: str) -> None:
    content = random_content()
    folder = written(tmp_path, name, content, shards=3)
    index = json.loads(next(folder.glob("*.safetensors.index.json")).read_text())
    weight_map = index["weight_map"]
    weight, scale = ON_DISK[name][:2]
    assert all(weight_map[key + weight] != weight_map[key + scale] for key in content.layers)
    assert sorted(set(weight_map.values())) == sorted(path.name for path in folder.glob("*-of-00003.safetensors"))
    assert weight_map.keys() == headers(folder).keys()
    sizes = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "BF16": 2, "F32": 4}
    bytes_ = [sizes[dtype] * torch.Size(shape).numel() for dtype, shape in headers(folder).values()]
    assert index["metadata"]["total_size"] == sum(bytes_)


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (128, 4), (160, 5), (300, 12)])
def test_the_swizzle_puts_every_scale_where_its_definition_says(n: int, columns: int) -> None:
    scale = torch.randint(1, 256, (n, columns), dtype=torch.uint8)
    expected = torch.zeros(-(-n // 128) * -(-columns // 4) * 512, dtype=torch.uint8)
    for row in range(n):
        for column in range(columns):
            tile = (row // 128) * -(-columns // 4) + column // 4
            expected[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scale[row, column]
    assert_same(swizzled(scale), expected)


# --- read by the formats' own code ---------------------------------------------------------------------


def test_compressed_tensors_decompresses_what_we_wrote(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    content = random_content(scale_bytes=range(16, 240))
    folder = written(tmp_path, "compressed-tensors", content)
    config = QuantizationConfig.model_validate(quantization_config(folder))
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    found = tensors_in(folder)
    for name, layer in content.layers.items():
        pair = {key: found[f"{name}.{key}"] for key in ("weight", "weight_scale")}
        actual = compressor.decompress(pair, scheme)["weight"]
        assert_same(actual, expected_from_float64(layer.weight, layer.scale, torch.bfloat16))


LOADED = [name for name in WRITERS if name.startswith(("mxfp8", "fp8", "compressed"))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADED)
def test_transformers_loads_what_we_wrote(tmp_path: Path, name: str, llama: Any) -> None:
    pytest.importorskip("accelerate")  # its FP8 asks for it
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    content = block_constant(llama_content(llama), BLOCK_ROWS.get(name, 1))
    folder = written(tmp_path, name, content, shards=2)
    config = CompressedTensorsConfig if name == "compressed-tensors" else FineGrainedFP8Config
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(dequantize=True)).state_dict()
    weights = {f"{key}.weight": reference.dequant(layer.weight, layer.scale) for key, layer in content.layers.items()}
    for key, expected in (content.plain | weights).items():
        assert_same(loaded[key], expected)


def test_the_metadata_of_torchao_names_every_tensor(tmp_path: Path) -> None:
    folder = written(tmp_path, "torchao-swizzled", random_content(), shards=2)
    every = headers(folder).keys()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        named = set()
        for name in json.loads(metadata["tensor_names"]):
            entry = json.loads(metadata[name])
            module, parameter = name.rsplit(".", 1)
            parts = {f"{module}._{parameter}_{part}" for part in entry.get("_tensor_data_names", [])}
            named |= parts if entry["_type"] == "MXTensor" else {name}
        assert named == every


# --- the contents --------------------------------------------------------------------------------------


def test_every_code_but_nan_is_in_every_layer() -> None:
    for nan_codes, codes in ((False, 254), (True, 256)):
        for layer in random_content(nan_codes=nan_codes).layers.values():
            assert len(layer.weight.view(torch.uint8).unique()) == codes
            assert layer.weight.float().isnan().any() == nan_codes


def test_what_a_format_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the scales differ within 32 rows"):
        WRITERS["fp8-32x32"](tmp_path / "a", random_content())
    with pytest.raises(ValueError, match="K = 108 is no multiple of 32"):
        WRITERS["modelopt"](tmp_path / "b", ragged(random_content()))
    with pytest.raises(ValueError, match="ComfyUI has one file, not 2"):
        WRITERS["comfyui"](tmp_path / "c", random_content(), shards=2)


def test_a_short_block_keeps_its_scale_and_is_padded_with_zeros(tmp_path: Path) -> None:
    whole, cut = random_content(), ragged(random_content())
    found = headers(written(tmp_path, "modelslim", cut))
    for name, layer in padded(cut).layers.items():
        n, k = layer.weight.shape
        assert found[f"{name}.weight"] == ("F8_E4M3", [n, k - 20])
        assert found[f"{name}.weight_scale"] == ("U8", [n, k // 32])
        assert_same(layer.weight[:, :-20], whole.layers[name].weight[:, :-20])
        assert not layer.weight[:, -20:].view(torch.uint8).any()


def test_modelopt_tells_of_the_kv_cache_and_of_other_kinds(tmp_path: Path) -> None:
    content = with_kv_scales(with_fp8_layer(random_content()))
    folder = written(tmp_path, "modelopt-mixed", content)
    config = quantization_config(folder)
    older = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    assert older["kv_cache_quant_algo"] == "FP8"
    assert config["quantized_layers"] == older["quantized_layers"]
    algorithms = {name: entry["quant_algo"] for name, entry in config["quantized_layers"].items()}
    assert algorithms == dict.fromkeys(content.layers, "MXFP8") | {"model.layers.0.mlp.up_proj": "FP8"}
    assert headers(folder)["model.layers.0.self_attn.k_proj.k_scale"] == ("F32", [])


def test_a_llama_becomes_a_content(llama: Any) -> None:
    content = llama_content(llama)
    assert len(content.layers) == 7
    assert content.plain.keys() | {f"{name}.weight" for name in content.layers} == llama.state_dict().keys()
    assert content.config["architectures"] == ["LlamaForCausalLM"]
    assert content.config["dtype"] == "bfloat16"
    assert content.unquantized == ["lm_head"]
