"""save_pretrained of MXFP8 models: what is written is read back bit for bit, by us and by others' rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tensors_in
from helpers import assert_same

transformers = pytest.importorskip("transformers")
pytest.importorskip("mxfp8_ops.transformers")

import plugged  # noqa: E402
from llamas import (  # noqa: E402
    LAYER,
    assert_holds,
    assert_same_state,
    content_of,
    kinds,
    llama,
    load,
    logits,
    quantization_of,
    without,
    write,
    write_dense,
)

import mxfp8_ops  # noqa: E402
from mxfp8_ops import environment, reference  # noqa: E402
from mxfp8_ops.checkpoint import open_checkpoint  # noqa: E402
from mxfp8_ops.transformers import Mxfp8Config, attach, take_over  # noqa: E402

SAVED = {"modelopt": ".weight_scale", "mxfp8": ".weight_scale_inv", "compressed-tensors": ".weight_scale"}


quiet = plugged.quiet


def loaded(folder: Path, how: str) -> Any:
    """A model of ``content_of("modelopt")``: loaded as it is, packed, or quantized on the way in."""
    content = content_of("modelopt")
    if how == "quantized":
        llama().save_pretrained(folder / "from")
        return load(folder / "from", quantization_config=Mxfp8Config())
    model = load(write(folder / "from", "modelopt", content))
    return model if how == "loaded" else mxfp8_ops.pack_(model) and model


@pytest.mark.parametrize("form", SAVED)
@pytest.mark.parametrize("how", ["loaded", "quantized", "packed"])
def test_what_is_saved_is_loaded_bit_for_bit(form: str, how: str, tmp_path: Path) -> None:
    content = content_of("modelopt")
    model = loaded(tmp_path, how)
    model.config.quantization_config.save_format = form
    model.save_pretrained(tmp_path / "to", max_shard_size="100KB")
    assert len(list((tmp_path / "to").glob("*.safetensors"))) > 3
    with take_over():
        again = load(tmp_path / "to")
    assert_holds(again, content)
    assert_same_state(again, model)


@pytest.mark.parametrize("form", SAVED)
def test_what_is_saved_is_a_checkpoint_of_that_format(form: str, tmp_path: Path) -> None:
    content = without(content_of("modelopt"), LAYER)
    model = load(write(tmp_path / "from", "modelopt", content), quantization_config=Mxfp8Config(save_format=form))
    model.save_pretrained(tmp_path / "to")
    checkpoint = open_checkpoint(tmp_path / "to")
    assert checkpoint.format.name == form
    assert checkpoint.keys() == content.layers.keys()
    for name, layer in content.layers.items():
        assert_same(checkpoint[name].weight, layer.weight)
        assert_same(checkpoint[name].scale, layer.scale)
    assert all(name.removesuffix(".weight") + SAVED[form] in checkpoint.files for name in content.layers)
    assert [checkpoint.format.quantized(name) for name in ("lm_head", LAYER)] == [False, False]
    assert not any(checkpoint.format.quantized(name) is False for name in content.layers)


def test_modelopt_is_saved_as_servers_want_it(tmp_path: Path) -> None:
    """vLLM: the method and the algorithm in config.json, wildcards for what to leave, uint8 scales of every row."""
    loaded(tmp_path, "quantized").save_pretrained(tmp_path / "to")
    config, tensors = quantization_of(tmp_path / "to"), tensors_in(tmp_path / "to")
    assert config is not None
    assert (config["quant_method"], config["quant_algo"], config["ignore"]) == ("modelopt", "MXFP8", ["lm_head"])
    quantized = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantized) == 14
    for name in quantized:
        n, k = tensors[name].shape
        scale = tensors[f"{name}_scale"]
        assert (scale.dtype, tuple(scale.shape)) == (torch.uint8, (n, k // 32))
    assert not any(name.endswith("weight_scale") and name.removesuffix("_scale") not in quantized for name in tensors)


def test_transformers_itself_reads_what_is_saved_as_mxfp8(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    content = content_of("modelopt")
    model = loaded(tmp_path, "loaded")
    model.config.quantization_config.save_format = "mxfp8"
    model.save_pretrained(tmp_path / "to")
    theirs = load(tmp_path / "to")  # without a GPU it dequantizes
    assert_same_state(theirs, load(write_dense(tmp_path / "dense", content)))


def test_compressed_tensors_itself_reads_what_is_saved_as_such(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    content = content_of("modelopt")
    model = loaded(tmp_path, "loaded")
    model.config.quantization_config.save_format = "compressed-tensors"
    model.save_pretrained(tmp_path / "to")
    theirs = load(tmp_path / "to", quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    for name, layer in content.layers.items():
        expected = reference.dequant(layer.weight, layer.scale)
        assert_same(theirs.get_submodule(name).weight.detach(), expected)


def test_a_format_can_be_asked_for_at_any_time(tmp_path: Path) -> None:
    model = loaded(tmp_path, "loaded")
    for form in ("mxfp8", "modelopt", "fp8-1x32"):
        model.config.quantization_config.save_format = form
        model.save_pretrained(tmp_path / "to")
        assert open_checkpoint(tmp_path / "to").format.name == form
    model.config.quantization_config.save_format = "gguf"
    with pytest.raises(ValueError, match=r"save_format must be one of .*, got 'gguf'"):
        model.save_pretrained(tmp_path / "to")


def test_a_model_that_was_dequantized_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = load(
        write(tmp_path / "from", "modelopt", content_of("modelopt")),
        quantization_config=Mxfp8Config(dequant_at_load=True),
    )
    model.save_pretrained(tmp_path / "to")
    assert quantization_of(tmp_path / "to") is None
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "to").values()} == {torch.bfloat16}
    assert_same_state(load(tmp_path / "to"), model)


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    content = content_of("modelopt", llama(tie_word_embeddings=True))
    model = load(write(tmp_path / "from", "modelopt", content))
    model.save_pretrained(tmp_path / "to")
    assert "lm_head.weight" not in tensors_in(tmp_path / "to")
    assert_same_state(load(tmp_path / "to"), model)


@pytest.mark.parametrize("original", [True, False])
def test_names_of_the_file_and_of_the_model_are_both_left_unquantized(original: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "dtype": "bfloat16"}
    config = transformers.MixtralConfig(**sizes, **heads)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "from")
    model = load(tmp_path / "from", quantization_config=Mxfp8Config())
    model.save_pretrained(tmp_path / "to", save_original_format=original)
    before, after = tensors_in(tmp_path / "from"), tensors_in(tmp_path / "to")
    if original:
        assert {name for name in after if not name.endswith("_scale")} == before.keys()
    quantization = quantization_of(tmp_path / "to")
    assert quantization is not None
    assert quantization["ignore"] == [
        "lm_head",
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.gate",
    ]
    assert_same_state(load(tmp_path / "to"), model)


def test_the_same_model_answers_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.KERNELS, "off")
    model = loaded(tmp_path, "quantized")
    model.save_pretrained(tmp_path / "to")
    again = load(tmp_path / "to")
    assert kinds(again) == kinds(model)
    assert_same(logits(again), logits(model))


def test_saving_writes_no_option_of_this_package_into_config_json(tmp_path: Path) -> None:
    model = loaded(tmp_path, "quantized")
    model.save_pretrained(tmp_path / "to")
    assert "mxfp8_ops" not in (tmp_path / "to" / "config.json").read_text().replace("mxfp8-ops", "")
    assert json.loads(model.config.to_json_string())["quantization_config"] == quantization_of(tmp_path / "to")


def test_a_model_that_was_quantized_in_place_is_saved_once_it_is_attached(tmp_path: Path) -> None:
    model = llama()
    mxfp8_ops.quantize_(model, lambda module, name: name != "lm_head")
    attach(model, Mxfp8Config(save_format="mxfp8")).save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).format.name == "mxfp8"
    with take_over():
        assert_same_state(load(tmp_path), model)


def test_a_layer_left_in_another_format_keeps_its_neighbours_quantized(tmp_path: Path) -> None:
    content = without(content_of("mxfp8"), LAYER)
    folder = write(tmp_path / "from", "mxfp8", replace(content, unquantized=["lm_head", LAYER]))
    with take_over():
        model = load(folder)
    model.save_pretrained(tmp_path / "to")
    assert_holds(load(tmp_path / "to"), content)
