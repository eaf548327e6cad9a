"""Checkpoints that contradict themselves: refused with a message that says what against what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, assert_opens_as, edit_config, edit_header, edit_json, replace_tensors, small

from mxfp8_ops.checkpoint import CheckpointError, open_checkpoint

Q, K = SMALL
Edit = Callable[[Path], Any]


def older(**changes: Any) -> Edit:
    """Changes hf_quant_config.json."""
    return lambda folder: edit_json(folder / "hf_quant_config.json", lambda each: each["quantization"].update(changes))


def types(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "quant_model_description.json", lambda each: each.update(changes))


def config(**changes: Any) -> Edit:
    return lambda folder: edit_config(folder, **changes)


def tensors(**changes: torch.Tensor | None) -> Edit:
    def edit(folder: Path) -> None:
        replace_tensors(next(folder.glob("*.safetensors")), changes)
        for index in folder.glob("*.index.json"):
            index.unlink()  # of one file

    return edit


def metadata(**changes: str | None) -> Edit:
    return lambda folder: replace_tensors(next(folder.glob("*.safetensors")), {}, **changes)


def layers_of(*names: str, **changes: Any) -> dict[str, Any]:
    return dict.fromkeys(names, {"quant_algo": "MXFP8", "group_size": 32} | changes)


def in_both(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        edit_config(folder, **changes)
        older(**changes)(folder)

    return edit


E4M3 = {"elem_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}, "block_size": 32}
BF16 = torch.zeros(96, 64, dtype=torch.bfloat16)
BARE = {f"{Q}.weight": BF16, f"{Q}.weight_scale": None, f"{Q}.comfy_quant": None}
CONTRADICTIONS: dict[str, tuple[str, Edit, str]] = {
    "modelopt: two algorithms": (
        "modelopt",
        older(quant_algo="FP8"),
        "quant_algo is 'MXFP8' in config.json, 'FP8' in hf",
    ),
    "modelopt: two sizes": ("modelopt", older(group_size=16), "group_size is 32 in config.json, 16 in hf_quant_config"),
    "modelopt: two lists": ("modelopt", older(exclude_modules=["*k_proj"]), f"{K} has scales, but the config says"),
    "modelopt: two maps": (
        "modelopt-mixed",
        older(quantized_layers=layers_of(Q)),
        "quantized_layers is .*k_proj.* in config.json, .* in hf_quant_config.json",
    ),
    "modelopt and fp8": (
        "modelopt",
        config(quant_method="fp8", weight_block_size=[128, 128]),
        r"quantization_config and hf_quant_config\.json do not go together; found: .*'fp8'.*'MXFP8'",
    ),
    "modelopt and mxfp8": (
        "modelopt-hf-quant-config",
        lambda folder: edit_json(
            folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "mxfp8"})
        ),
        r"quantization_config and hf_quant_config\.json do not go together; found: .*'mxfp8'.*'MXFP8'",
    ),
    "modelslim and mxfp8": (
        "modelslim",
        lambda folder: edit_json(
            folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "mxfp8"})
        ),
        "contradictory, mxfp8 and modelslim do not go together",
    ),
    "comfyui and fp8": (
        "comfyui",
        lambda folder: (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}'),
        "found: quantization_config {'quant_method': 'fp8'}; layers that are .*mxfp8",
    ),
    "modelopt ignores a layer": (
        "modelopt",
        in_both(ignore=[Q], exclude_modules=[Q]),
        f"{Q} has scales, but the config",
    ),
    "modelopt ignores by wildcard": ("modelopt-hf-quant-config", older(exclude_modules=["*.q_*"]), f"{Q} has scales"),
    "modelopt-mixed ignores a layer": ("modelopt-mixed", in_both(ignore=[Q], exclude_modules=[]), f"{Q} has scales"),
    "mxfp8 ignores a layer": ("mxfp8", config(ignored_layers=["self_attn.q_proj"]), f"{Q} has scales"),
    "fp8 ignores a layer": ("fp8-32x32", config(modules_to_not_convert=["model.layers.0"]), f"{K} has scales"),
    "compressed-tensors ignores a layer": ("compressed-tensors", config(ignore=["re:.*q_proj"]), f"{Q} has scales"),
    "auto-round leaves a layer": ("auto-round", config(extra_config={Q: {"bits": 16}}), f"{Q} has scales"),
    "auto-round leaves by regex": ("auto-round", config(extra_config={".*q_proj": {"bits": 4}}), f"{Q} has scales"),
    "quark excludes a layer": ("quark", config(exclude=["re:.*self_attn.*"]), f"{K} has scales"),
    "quark has another kind of layer": ("quark", config(layer_quant_config={"*.q_proj": {"weight": None}}), f"{Q} has"),
    "modelslim has another kind of layer": ("modelslim", types(**{f"{Q}.weight": "FLOAT"}), f"{Q} has scales, but"),
    "modelslim does not name a layer": ("modelslim", types(**{f"{Q}.weight": None}), rf"{Q}\.weight \(None\)"),
    "modelslim names a layer without scales": ("modelslim", tensors(**BARE), rf"have no scales: {Q}\.weight"),
    "modelslim names no tensor": (
        "modelslim",
        types(**{"x.weight": "W8A8_MXFP8"}),
        "missing or have no scales: x.weight",
    ),
    "modelslim is mixed": (
        "modelslim",
        types(**{"lm_head.weight": "W8A8_DYNAMIC"}),
        r"lm_head\.weight \(W8A8_DYNAMIC\)",
    ),
    "mixed: no tensors": (
        "modelopt-mixed",
        in_both(quantized_layers=layers_of(Q, K, "x.y")),
        "quantized_layers names layers that have no tensors in MXFP8: x.y",
    ),
    "mixed: not named": (
        "modelopt-mixed",
        in_both(quantized_layers=layers_of(Q)),
        f"{K} has scales, but the config says",
    ),
    "mixed: blocks of 16": (
        "modelopt-mixed",
        in_both(quantized_layers=layers_of(Q) | layers_of(K, group_size=16)),
        rf"{K} \(MXFP8 in blocks of 16\)",
    ),
    "mixed: no map": ("modelopt-mixed", in_both(quantized_layers=None), "needs an object quantized_layers"),
    "mixed: a list": (
        "modelopt-mixed",
        in_both(quantized_layers=[Q, K]),
        "quantized_layers must be an object of objects",
    ),
    "comfyui names no tensor": (
        "comfyui",
        tensors(**{"x.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}),
        "said to be MXFP8, but have no such tensors: x",
    ),
    "comfyui names a layer without scales": ("comfyui", tensors(**BARE), f"have no such tensors: {Q}"),
    "comfyui says two things": (
        "comfyui",
        metadata(_quantization_metadata=json.dumps({"layers": {Q: {"format": "nvfp4"}}})),
        rf"{Q}\.comfy_quant .* says 'mxfp8', but _quantization_metadata 'nvfp4'",
    ),
    "comfyui is mixed": (
        "comfyui-metadata",
        metadata(_quantization_metadata=json.dumps({"layers": {Q: {"format": "nvfp4"}, K: {"format": "mxfp8"}}})),
        rf"otherwise than MXFP8: {Q} \(nvfp4\)",
    ),
    "torchao is mixed": (
        "torchao",
        metadata(**{f"{Q}.weight": '{"_type": "NVFP4Tensor"}'}),
        rf"{Q}\.weight \(NVFP4Tensor\)",
    ),
    "torchao does not name a layer": (
        "torchao",
        metadata(**{f"{Q}.weight": None}),
        rf"belong to no weight: {Q}\._weight_scale",
    ),
    "torchao names no tensor": ("torchao", tensors(**{f"{Q}._weight_scale": None}), rf"there is no {Q}\._weight_scale"),
    "torchao does not say whether swizzled": (
        "torchao",
        metadata(**{f"{Q}.weight": json.dumps({"_type": "MXTensor", "_data": E4M3})}),
        rf"{Q}\.weight must say whether its scales are swizzled",
    ),
    "no layer at all": (
        "mxfp8",
        tensors(**{f"{layer}.{part}": None for layer in SMALL for part in ("weight", "weight_scale_inv")}),
        "says that it is mxfp8, but no layer in it has scales",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(tmp_path: Path, case: str) -> None:
    name, edit, found = CONTRADICTIONS[case]
    path, content = small(tmp_path, name)
    assert_opens_as(path, content)
    edit(path)
    with pytest.raises(CheckpointError, match=found):
        open_checkpoint(path)


def test_torchaos_shards_must_agree_on_a_layer(tmp_path: Path) -> None:
    path, content = small(tmp_path, "torchao-swizzled", shards=2)
    assert_opens_as(path, content)
    said = json.dumps({"_type": "MXTensor", "_data": {"is_swizzled_scales": False}})
    edit_header(
        path / "model-00002-of-00002.safetensors", lambda each: each["__metadata__"].update({f"{Q}.weight": said})
    )
    with pytest.raises(CheckpointError, match=rf"the files does not agree on {Q}\.weight"):
        open_checkpoint(path)


def test_comfyuis_metadata_may_lack_the_first_components_of_names(tmp_path: Path) -> None:
    path, content = small(tmp_path, "comfyui-metadata")
    short = {layer.removeprefix("model."): {"format": "mxfp8"} for layer in SMALL}
    replace_tensors(path / "model_mxfp8.safetensors", {}, _quantization_metadata=json.dumps({"layers": short}))
    assert_opens_as(path, content)
    half = {Q.removeprefix("model.la"): {"format": "mxfp8"}, K: {"format": "mxfp8"}}
    replace_tensors(path / "model_mxfp8.safetensors", {}, _quantization_metadata=json.dumps({"layers": half}))
    with pytest.raises(CheckpointError, match=f"{Q} has scales, but the config says that it is not quantized"):
        open_checkpoint(path)
