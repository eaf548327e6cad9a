"""from_pretrained of MXFP8 checkpoints: the right weights in the right modules."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same

transformers = pytest.importorskip("transformers")
pytest.importorskip("mxfp8_ops.transformers")

import plugged  # noqa: E402
from llamas import (  # noqa: E402
    LAYER,
    PROMPT,
    assert_holds,
    assert_same_state,
    content_of,
    kinds,
    llama,
    load,
    logits,
    without,
    write,
    write_dense,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, FineGrainedFP8Config, MixtralConfig, MixtralForCausalLM  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

import mxfp8_ops  # noqa: E402
from mxfp8_ops import Mxfp8Linear  # noqa: E402
from mxfp8_ops.transformers import Mxfp8Config, give_back, take_over  # noqa: E402
from mxfp8_ops.transformers.version import check_version  # noqa: E402

ONE_TO_EIGHT = (
    *("modelopt", "modelopt-mixed", "mxfp8", "mxfp8-transformers", "fp8-1x32", "fp8-1x32-e8m0", "fp8-32x32"),
    *("fp8-32x32-u8", "fp8-32x32-scale", "compressed-tensors", "auto-round", "quark", "quark-per-block"),
)


quiet, reference_computes = plugged.quiet, plugged.reference_computes


def linears(content: Any) -> dict[str, str]:
    return {**dict.fromkeys(content.layers, "Mxfp8Linear"), "lm_head": "Linear"}


# --- the right weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ONE_TO_EIGHT)
def test_every_format_loads_bit_for_bit_and_computes_what_its_weights_stand_for(
    variant: str, tmp_path: Path, reference_computes: None
) -> None:
    content = content_of(variant)
    with take_over():
        model = load(write(tmp_path / "mxfp8", variant, content, shards=2))
    assert kinds(model) == linears(content)
    assert_holds(model, content)
    assert model.dtype == torch.bfloat16
    dense = load(write_dense(tmp_path / "dense", content))
    assert_same(logits(model), logits(dense))


def test_generation_is_token_for_token_that_of_the_dequantized_weights(
    tmp_path: Path, reference_computes: None
) -> None:
    content = content_of("modelopt")
    models = load(write(tmp_path / "mxfp8", "modelopt", content)), load(write_dense(tmp_path / "dense", content))
    tokens = [model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None) for model in models]
    assert tokens[0].shape == (2, 21)
    assert torch.equal(*tokens)


def test_with_kernels_logits_differ_by_their_order_of_adding_up_only(tmp_path: Path) -> None:
    content = content_of("modelopt")
    actual = logits(load(write(tmp_path / "mxfp8", "modelopt", content))).float()
    expected = logits(load(write_dense(tmp_path / "dense", content))).float()
    assert (actual - expected).norm() < 0.02 * expected.norm()


def test_modelopt_needs_no_take_over(tmp_path: Path) -> None:
    content = content_of("modelopt")
    assert_holds(load(write(tmp_path, "modelopt", content)), content)


def test_the_older_file_of_modelopt_is_found_when_asked_for(tmp_path: Path) -> None:
    content = content_of("modelopt")
    folder = write(tmp_path, "modelopt-hf-quant-config", content)
    assert_holds(load(folder, quantization_config=Mxfp8Config()), content)


@pytest.mark.parametrize("ignored", [LAYER, "model.layers.0.self_attn.q_proj"])
def test_an_ignored_linear_stays_as_it_is(ignored: str, tmp_path: Path) -> None:
    content = without(content_of("modelopt"), ignored)
    model = load(write(tmp_path, "modelopt", content))
    assert kinds(model) == linears(content) | {ignored: "Linear"}
    assert_same(model.get_submodule(ignored).weight.detach(), content.plain[f"{ignored}.weight"])


def test_a_part_of_a_name_ignores_nothing(tmp_path: Path) -> None:
    content = content_of("modelopt")
    model = load(write(tmp_path, "modelopt", replace(content, unquantized=["lm_head", "proj", "layers.1", "mlp"])))
    assert kinds(model) == linears(content)


def test_a_quantized_lm_head_is_kept(tmp_path: Path, reference_computes: None) -> None:
    content = content_of("modelopt")
    weight, scale = mxfp8_ops.quantize(content.plain.pop("lm_head.weight"))
    content.layers["lm_head"] = type(content.layers[LAYER])(weight, scale)
    model = load(write(tmp_path / "mxfp8", "modelopt", replace(content, unquantized=[])))
    assert_holds(model, content)
    assert_same(logits(model), logits(load(write_dense(tmp_path / "dense", content))))


@pytest.mark.parametrize("quantized", [None, "model.embed_tokens", "lm_head"])
def test_tied_embeddings_stay_tied(quantized: str | None, tmp_path: Path, reference_computes: None) -> None:
    content = content_of("modelopt", llama(tie_word_embeddings=True))
    if quantized is not None:
        weight, scale = mxfp8_ops.quantize(content.plain.pop("model.embed_tokens.weight"))
        content.layers[quantized] = type(content.layers[LAYER])(weight, scale)
    model = load(write(tmp_path / "mxfp8", "modelopt", replace(content, unquantized=[])))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert_same(logits(model), logits(load(write_dense(tmp_path / "dense", content))))


def test_a_model_without_the_head_loads_the_same_layers(tmp_path: Path) -> None:
    content = content_of("mxfp8")
    with take_over():
        model = AutoModel.from_pretrained(write(tmp_path, "mxfp8", content))
    assert type(model).__name__ == "LlamaModel"
    for name, layer in content.layers.items():
        assert_same(model.get_submodule(name.removeprefix("model.")).weight, layer.weight)


def test_names_that_the_caller_maps_are_found(tmp_path: Path) -> None:
    content = content_of("mxfp8")
    moved = {name.replace("model.layers", "trunk.blocks"): layer for name, layer in content.layers.items()}
    folder = write(tmp_path, "mxfp8", replace(content, layers=moved))
    with take_over():
        model = load(folder, key_mapping={r"^trunk\.blocks": "model.layers"})
    assert_holds(model, content)


def test_names_of_weights_that_the_caller_maps_take_their_scales_along(tmp_path: Path) -> None:
    content = content_of("mxfp8")
    moved = {name.replace("down_proj", "lower"): layer for name, layer in content.layers.items()}
    folder = write(tmp_path, "mxfp8", replace(content, layers=moved))
    with take_over():
        model = load(folder, key_mapping={r"mlp.lower.weight": "mlp.down_proj.weight"})
    assert_holds(model, content)


def test_layers_that_the_model_does_not_have_at_all_are_an_error(tmp_path: Path) -> None:
    content = content_of("modelopt")
    moved = {name.replace("model.layers", "trunk.blocks"): layer for name, layer in content.layers.items()}
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has none of the checkpoint's MXFP8 layers: trunk\.blocks"):
        load(write(tmp_path, "modelopt", replace(content, layers=moved)))


# --- experts -------------------------------------------------------------------------------------------


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, dtype="bfloat16")
    ).to(torch.bfloat16)


def write_experts(folder: Path, model: MixtralForCausalLM, ending: str, quantization: dict[str, Any]) -> None:
    """Attention and experts, one by one as the file of Mixtral has them, quantized; beside it what that stands for."""
    model.save_pretrained(folder / "dense")
    tensors, dense = {}, load_file(folder / "dense" / "model.safetensors")
    for name, tensor in dense.items():
        tensors[name] = tensor
        if ".experts." in name or "_proj." in name:
            tensors[name], tensors[name.removesuffix("weight") + ending] = mxfp8_ops.quantize(tensor)
            dense[name] = mxfp8_ops.dequant(tensors[name], tensors[name.removesuffix("weight") + ending])
    save_file(dense, folder / "dense" / "model.safetensors")
    (folder / "mxfp8").mkdir()
    save_file(tensors, folder / "mxfp8" / "model.safetensors")
    config = json.loads((folder / "dense" / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "mxfp8" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("ending", "quantization"),
    [
        ("weight_scale", {"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": ["lm_head", "*.gate"]}),
        ("weight_scale_inv", {"quant_method": "mxfp8", "ignored_layers": ["lm_head", "gate"]}),
    ],
    ids=["modelopt", "mxfp8"],
)
def test_experts_one_by_one_are_dequantized_into_their_parameter(
    ending: str, quantization: dict[str, Any], tmp_path: Path, reference_computes: None
) -> None:
    write_experts(tmp_path, mixtral(), ending, quantization)
    with take_over():
        model = load(tmp_path / "mxfp8")
    dense = load(tmp_path / "dense")
    assert set(kinds(model).values()) == {"Mxfp8Linear", "Linear"}
    assert_same(model.model.layers[0].mlp.experts.gate_up_proj, dense.model.layers[0].mlp.experts.gate_up_proj)
    assert_same(logits(model), logits(dense))


@pytest.mark.parametrize("variant", ["modelopt", "mxfp8"])
def test_experts_in_one_tensor_are_dequantized_into_their_parameter(variant: str, tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=384, hidden_size=64, moe_intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts=3, num_experts_per_tok=2, head_dim=32, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    content = content_of(variant, model)
    for name in [name for name in content.plain if ".experts." in name]:
        pair = mxfp8_ops.quantize(content.plain.pop(name))
        content.layers[name] = type(next(iter(content.layers.values())))(*pair)
    with take_over():
        loaded = load(write(tmp_path / "mxfp8", variant, content))
    assert_same_state(loaded.dequantize(), load(write_dense(tmp_path / "dense", content)))


# --- who is asked --------------------------------------------------------------------------------------


def test_take_over_can_be_undone_and_repeated() -> None:
    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    with take_over():
        during = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
        with take_over():
            assert during == auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        assert during == auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert before == auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert {name for name in before if before[name] is not during[name]} == {
        "mxfp8", "fp8", "compressed-tensors", "auto-round", "quark",
    }  # fmt: skip
    take_over()
    give_back()
    give_back()
    assert before == auto.AUTO_QUANTIZATION_CONFIG_MAPPING


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "float"},
        {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
        },
    ],
    ids=["fp8", "fp8 with float scales", "auto-round", "compressed-tensors"],
)
def test_after_take_over_other_checkpoints_go_to_transformers_as_before(config: dict[str, Any]) -> None:
    if config["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    before = auto.AutoQuantizationConfig.from_dict(dict(config))
    with take_over():
        after = auto.AutoQuantizationConfig.from_dict(dict(config))
    assert type(after) is type(before)
    assert type(after) is not Mxfp8Config
    assert after.to_dict() == before.to_dict()
    assert auto.AUTO_QUANTIZER_MAPPING[after.quant_method] is not auto.AUTO_QUANTIZER_MAPPING["mxfp8_ops"]


def test_without_take_over_transformers_keeps_its_own_names(tmp_path: Path) -> None:
    folder = write(tmp_path, "mxfp8", content_of("mxfp8"))
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["mxfp8"] is FineGrainedFP8Config
    pytest.importorskip("accelerate")
    assert not any(isinstance(module, Mxfp8Linear) for module in load(folder).modules())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown quantization rule 'nearest'"):
        Mxfp8Config(rule="nearest")
    with pytest.raises(ValueError, match=r"save_format must be one of modelopt, mxfp8, .* got 'gguf'"):
        Mxfp8Config(save_format="gguf")
    with pytest.raises(TypeError, match="dequant_at_load must be True, False or None, got 'yes'"):
        Mxfp8Config(dequant_at_load="yes")
    with pytest.raises(ValueError, match="mxfp8_ops has no option bits: use rule"):
        Mxfp8Config.from_dict({"quant_method": "mxfp8_ops", "bits": 8})


def test_an_older_transformers_is_refused() -> None:
    check_version("5.23.0")
    check_version("6.0.0.dev0")
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or later, got 5\.22\.2: pip install -U"):
        check_version("5.22.2")


def test_without_transformers_the_import_says_what_to_install() -> None:
    program = "import sys; sys.modules['transformers'] = None; import mxfp8_ops.transformers"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: mxfp8_ops.transformers needs transformers: pip install mxfp8-ops[transformers]" in done.stderr
