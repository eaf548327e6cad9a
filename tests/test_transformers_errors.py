"""Checkpoints with something wrong, read by from_pretrained: errors that name the tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("mxfp8_ops.transformers")

import plugged  # noqa: E402
from llamas import LAYER, change_tensors, content_of, llama, load, write  # noqa: E402

from mxfp8_ops.transformers import Mxfp8Config  # noqa: E402

quiet = plugged.quiet

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"weight_scale": None}, f"no scales .*{LAYER}.weight "),
    "no weight": ({"weight": None}, f"no {LAYER}.weight that these scales"),
    "a float scale": ({"weight_scale": torch.ones(128, 11)}, f"{LAYER}.weight_scale .*E8M0"),
    "a scale of another shape": (
        {"weight_scale": torch.ones(128, 12, dtype=torch.uint8)},
        f"{LAYER}.weight_scale .*must be",
    ),
    "a scale that was never written": (
        {"weight_scale": torch.zeros(128, 11, dtype=torch.uint8)},
        f"all scales of {LAYER}.weight are 0",
    ),
    "a scale of a bfloat16 weight": ({"weight": torch.ones(128, 352).bfloat16()}, f"{LAYER}.weight .*not F8_E4M3"),
    "a weight of another shape": (
        {
            "weight": torch.zeros(64, 352).to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(64, 11, dtype=torch.uint8),
        },
        rf"{LAYER}.weight .*must be \[128, 352\]",
    ),
}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("dequant", [False, True], ids=["kept", "dequantized"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_in_a_checkpoint_is_an_error_that_names_the_tensor(
    change: str, dequant: bool, tmp_path: Path
) -> None:
    changes, message = WRONG[change]
    change_tensors(write(tmp_path, "modelopt", content_of("modelopt")), **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, quantization_config=Mxfp8Config(dequant_at_load=dequant))


def test_scales_of_an_ignored_layer_are_an_error(tmp_path: Path) -> None:
    content = replace(content_of("modelopt"), unquantized=["lm_head", "model.layers.1.mlp.*"])
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.\w+\.weight_scale .*not quantized"):
        load(write(tmp_path, "modelopt", content))


def test_a_missing_bias_is_an_error(tmp_path: Path) -> None:
    content = content_of("modelopt")
    content.layers["model.layers.0.self_attn.q_proj"].bias = None
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias is not in the checkpoint"):
        load(write(tmp_path, "modelopt", content))


@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8", "W4A16_AWQ"])
def test_other_algorithms_of_modelopt_are_an_error(algorithm: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "modelopt", content_of("modelopt"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = algorithm
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"format is none of .*{algorithm}"):
        load(folder)


def test_float8_weights_that_nothing_describes_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, "modelopt", content_of("modelopt"))
    (folder / "hf_quant_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no quantization_config.*F8_E4M3"):
        load(folder, quantization_config=Mxfp8Config())


def test_a_state_dict_instead_of_files_is_an_error() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"\.safetensors files, got none"):
        type(model).from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=Mxfp8Config()
        )
