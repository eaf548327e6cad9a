"""What only looks like MXFP8: refused with a message that lists what was found, whatever its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, edit_config, edit_json, replace_tensors, small, write_raw

from mxfp8_ops.checkpoint import CheckpointError, open_checkpoint
from mxfp8_ops.checkpoint.names import modules, names_or_regexes, wildcards

WEIGHTS = {"num_bits": 8, "type": "float", "group_size": 32}
Q, K = SMALL
Case = tuple[str, Callable[[Path], Any], str]
"""A format, what is changed in a checkpoint of it, and what the error must say."""


def other_algorithm(algorithm: str) -> Case:
    def edit(folder: Path) -> None:
        edit_json(folder / "hf_quant_config.json", lambda each: each["quantization"].update(quant_algo=algorithm))

    return "modelopt-hf-quant-config", edit, algorithm


def other_config(name: str, found: str, **changes: Any) -> Case:
    return name, lambda folder: edit_config(folder, **changes), found


def other_group(found: str, **changes: Any) -> Case:
    group = {"targets": ["Linear"], "weights": WEIGHTS | changes.pop("weights", {})} | changes
    return other_config("compressed-tensors", found, config_groups={"group_0": group})


def other_quark(found: str, **changes: Any) -> Case:
    weight = {"dtype": "fp8_e4m3", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"} | changes
    return other_config("quark", found, global_quant_config={"weight": weight})


def other_type(kind: str) -> Case:
    def rename(types: dict[str, Any]) -> None:
        types.update({key: kind for key, value in types.items() if value == "W8A8_MXFP8"})

    return "modelslim", lambda folder: edit_json(folder / "quant_model_description.json", rename), kind


def other_marker(kind: str) -> Case:
    def edit(folder: Path) -> None:
        marker = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
        file = folder / "model_mxfp8.safetensors"
        replace_tensors(file, {f"{layer}.comfy_quant": marker for layer in SMALL}, _quantization_metadata=None)

    return "comfyui", edit, kind


def other_metadata(found: str, kind: str = "MXTensor", **changes: Any) -> Case:
    def edit(folder: Path) -> None:
        said = {"elem_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}, "block_size": 32}
        text = json.dumps({"_type": kind, "_data": said | {"is_swizzled_scales": False} | changes})
        replace_tensors(folder / "model.safetensors", {}, **{f"{layer}.weight": text for layer in SMALL})

    return "torchao", edit, found


ALGORITHMS = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_MXFP4_FP8")
TYPES = ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "WFP8AFP8_DYNAMIC", "W4A8_MXFP", "W4A4_MXFP4", "W8A8_MXFP8X")
E5M2, FP4 = ({"_type": "torch.dtype", "_data": each} for each in ("float8_e5m2", "float4_e2m1fn_x2"))
OTHERS = {
    **{f"modelopt {algorithm}": other_algorithm(algorithm) for algorithm in (*ALGORITHMS, "MXFP4", "XMXFP8")},
    "modelopt_fp4": other_config("modelopt", "modelopt_fp4", quant_method="modelopt_fp4"),
    "mxfp8 [32, 32]": other_config("mxfp8", r"\[32, 32\]", weight_block_size=[32, 32]),
    "mxfp8 float": other_config("mxfp8", "'scale_fmt': 'float'", scale_fmt="float"),
    "mxfp4": other_config("mxfp8", "mxfp4", quant_method="mxfp4"),
    "fp8 [128, 128]": other_config("fp8-1x32", r"\[128, 128\]", weight_block_size=[128, 128]),
    "fp8 [128, 128] float": other_config("fp8-1x32", r"\[128, 128\]", weight_block_size=[128, 128], scale_fmt=None),
    "fp8 [32, 1]": other_config("fp8-1x32", r"\[32, 1\]", weight_block_size=[32, 1]),
    "fp8 per tensor": other_config("fp8-1x32", "'quant_method': 'fp8'", weight_block_size=None),
    "fp8 [1, 32] float": other_config("fp8-1x32", "'scale_fmt': 'float'", scale_fmt="float"),
    "fbgemm_fp8": other_config("fp8-1x32", "fbgemm_fp8", quant_method="fbgemm_fp8"),
    **{
        f"compressed-tensors {kind}": other_config("compressed-tensors", kind, format=kind)
        for kind in ("float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized", "naive-quantized", "dense")
    },
    "group of float-quantized": other_group("float-quantized", format="float-quantized"),
    "group of 4 bits": other_group("'num_bits': 4", weights={"num_bits": 4}),
    "group of 128": other_group("'group_size': 128", weights={"group_size": 128}),
    "group of int": other_group("'type': 'int'", weights={"type": "int"}),
    "group with float scales": other_group("float8_e4m3fn", weights={"scale_dtype": "torch.float8_e4m3fn"}),
    "group of channels": other_group("channel", weights={"strategy": "channel"}),
    "auto-round 4 bits": other_config("auto-round", "'bits': 4", bits=4),
    "auto-round groups of 128": other_config("auto-round", "'group_size': 128", group_size=128),
    **{f"auto-round {kind}": other_config("auto-round", kind, data_type=kind) for kind in ("int", "nv_fp", "fp8")},
    "auto-round for GPTQ": other_config("auto-round", "auto_round:auto_gptq", packing_format="auto_round:auto_gptq"),
    **{f"quark {dtype}": other_quark(dtype, dtype=dtype) for dtype in ("fp4", "fp6_e2m3", "int8", "fp8_e5m2")},
    **{f"quark {scheme}": other_quark(scheme, qscheme=scheme) for scheme in ("per_tensor", "per_channel")},
    "quark [128, 128]": other_quark(r"\[128, 128\]", qscheme="per_block", block_size=[128, 128]),
    "quark groups of 128": other_quark("'group_size': 128", group_size=128),
    "quark float scales": other_quark("'scale_format': None", scale_format=None),
    **{f"modelslim {kind}": other_type(kind) for kind in TYPES},
    **{f"comfyui {kind}": other_marker(kind) for kind in ("float8_e4m3fn", "nvfp4", "int8_tensorwise", "mxfp8_x")},
    **{f"torchao {kind}": other_metadata(kind, kind) for kind in ("Float8Tensor", "NVFP4Tensor", "XMXTensor")},
    "torchao e5m2": other_metadata("float8_e5m2", elem_dtype=E5M2),
    "torchao fp4": other_metadata("float4_e2m1fn_x2", elem_dtype=FP4),
    "torchao blocks of 16": other_metadata("and 16", block_size=16),
    "no config": (
        "mxfp8",
        lambda folder: (folder / "config.json").unlink(),
        r"no quantization_config; .*F8_E4M3 \(2\)",
    ),
    "unknown": other_config("mxfp8", "gptq", quant_method="gptq"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_only_looks_like_mxfp8_is_refused_and_listed(tmp_path: Path, case: str) -> None:
    """The tensors are MXFP8 all the same: the config decides first, and by its exact words."""
    name, edit, found = OTHERS[case]
    path, _ = small(tmp_path, name)
    edit(path)
    with pytest.raises(CheckpointError, match=found):
        open_checkpoint(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"])
def test_short_floats_without_a_word_about_them_are_refused(tmp_path: Path, dtype: str) -> None:
    length = 32 * int(dtype[1]) // 8
    entry = {"dtype": dtype, "shape": [1, 32], "data_offsets": [0, length]}
    write_raw(tmp_path / "model.safetensors", {"x.weight": entry}, bytes(length))
    with pytest.raises(CheckpointError, match=rf"none of modelopt, .*tensors of {dtype} \(1\)"):
        open_checkpoint(tmp_path)


def test_comfyuis_integers_are_no_plain_tensors(tmp_path: Path) -> None:
    name, edit, found = other_marker("int8_tensorwise")
    path, _ = small(tmp_path, name)
    edit(path)
    integers = {f"{layer}.weight": torch.zeros(shape, dtype=torch.int8) for layer, shape in SMALL.items()}
    scales = {f"{layer}.weight_scale": torch.tensor(1.0) for layer in SMALL}
    replace_tensors(path / "model_mxfp8.safetensors", integers | scales)
    with pytest.raises(CheckpointError, match=found):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("rule", "pattern", "hits", "misses"),
    [
        (wildcards, "lm_head", ["lm_head"], ["lm_head.x", "model.lm_head", "lm_heads", "lm_hea"]),
        (
            wildcards,
            "model.layers.1*",
            ["model.layers.1.mlp", "model.layers.11"],
            ["model.layers.2", "a.model.layers.1"],
        ),
        (wildcards, "*router*", ["a.router", "router.b.c"], ["route", "a.b"]),
        (wildcards, "*.gate", ["mlp.gate", "a.b.gate"], ["gate", "mlp.gate_proj", "mlp.gates"]),
        (names_or_regexes, "lm_head", ["lm_head"], ["lm_head.x", "model.lm_head", "lm_heads"]),
        (names_or_regexes, "re:.*gate$", ["a.gate"], ["a.gate_proj", "gate.a"]),
        (names_or_regexes, "re:model.layers.0", ["model.layers.0.x", "model_layers_0"], ["a.model.layers.0"]),
        (names_or_regexes, "*gate", [], ["gate", "a.gate"]),
        (modules, "mlp.gate", ["mlp.gate", "layers.0.mlp.gate", "mlp.gate.x"], ["mlp.gate_proj", "amlp.gate", "gate"]),
        (modules, "model.layers.1", ["model.layers.1", "model.layers.1.x"], ["model.layers.11", "model.layers.10.x"]),
        (modules, "proj", ["proj", "a.proj"], ["q_proj", "a.q_proj", "proj_a"]),
    ],
)
def test_lists_of_modules_mean_whole_names(rule: Any, pattern: str, hits: list[str], misses: list[str]) -> None:
    assert [name for name in [*hits, *misses] if rule(name, [pattern])] == hits


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999}", "re:[z-a]", "re:" + "(" * 500])
@pytest.mark.parametrize(("name", "key"), [("compressed-tensors", "ignore"), ("quark", "exclude")])
def test_a_bad_regular_expression_is_an_error(tmp_path: Path, name: str, key: str, pattern: str) -> None:
    path, _ = small(tmp_path, name)
    edit_config(path, **{key: [pattern]})
    with pytest.raises(CheckpointError, match="is no regular expression"):
        open_checkpoint(path)
