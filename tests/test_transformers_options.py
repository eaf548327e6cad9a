"""Options of from_pretrained for MXFP8 checkpoints: the flag, dtypes, devices."""

from __future__ import annotations

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
    assert_holds,
    assert_same_state,
    content_of,
    kinds,
    llama,
    load,
    logits,
    write,
    write_dense,
)

import mxfp8_ops  # noqa: E402
from mxfp8_ops import environment  # noqa: E402
from mxfp8_ops.transformers import Mxfp8Config, take_over  # noqa: E402

quiet, reference_computes = plugged.quiet, plugged.reference_computes


@pytest.mark.parametrize(
    ("word", "option", "kept"),
    [
        (None, None, True),
        ("on", None, False),
        ("off", None, True),
        ("on", False, True),
        ("off", True, False),
        (None, True, False),
    ],
)
def test_the_flag_dequantizes_at_load_and_an_option_beats_it(
    word: str | None,
    option: bool | None,
    kept: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference_computes: None,
) -> None:
    content = content_of("modelopt")
    folder = write(tmp_path / "mxfp8", "modelopt", content)
    if word is not None:
        monkeypatch.setenv(environment.DEQUANT_AT_LOAD[0], word)
    model = load(folder, quantization_config=Mxfp8Config(dequant_at_load=option))
    if kept:
        assert_holds(model, content)
        assert model.is_quantized
    else:
        dense = load(write_dense(tmp_path / "dense", content))
        assert set(kinds(model).values()) == {"Linear"}
        assert_same_state(model, dense)
        assert not model.is_quantized
        assert not hasattr(model.config, "quantization_config")


def test_a_word_that_is_no_flag_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, "modelopt", content_of("modelopt"))
    monkeypatch.setenv(environment.DEQUANT_AT_LOAD[0], "perhaps")
    with pytest.raises(ValueError, match=r"MXFP8_DEQUANT_AT_LOAD .*perhaps"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_is_that_of_all_but_the_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    content = content_of("fp8-1x32-e8m0")
    with take_over():
        model = load(write(tmp_path, "fp8-1x32-e8m0", content), dtype=dtype)
    for layer in content.layers.values():
        layer.bias = None if layer.bias is None else layer.bias.to(dtype)
    assert_holds(model, content)
    others = {str(tensor.dtype) for tensor in model.state_dict().values()} - {"torch.float8_e4m3fn", "torch.uint8"}
    assert others == {str(dtype)}
    assert logits(model).dtype == dtype


def test_dequantized_in_another_dtype_is_rounded_once(tmp_path: Path) -> None:
    content = content_of("modelopt")
    model = load(
        write(tmp_path, "modelopt", content),
        dtype=torch.float16,
        quantization_config=Mxfp8Config(dequant_at_load=True),
    )
    layer = content.layers[LAYER]
    expected = mxfp8_ops.reference.dequant(layer.weight, layer.scale, torch.float16)
    assert_same(model.get_submodule(LAYER).weight.detach(), expected)


def test_a_dtype_that_is_none_of_activations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"dtype must be float32, bfloat16 or float16, got torch.float64"):
        load(write(tmp_path, "modelopt", content_of("modelopt")), dtype=torch.float64)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "disk"])
def test_a_device_map_loads_the_same_model(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    content = content_of("mxfp8")
    folder = write(tmp_path / "mxfp8", "mxfp8", content)
    options = {}
    if device_map == "disk":
        names = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
        device_map = {**dict.fromkeys(names, "cpu"), "model.layers.0": "disk"}
        options["offload_folder"] = tmp_path / "offloaded"
    with take_over():
        plain, mapped = load(folder), load(folder, device_map=device_map, **options)
    assert set(kinds(mapped).values()) == {"Mxfp8Linear", "Linear"}
    assert_same(logits(mapped), logits(plain))


def test_what_the_quantizer_says_it_can_do(tmp_path: Path) -> None:
    quantizer = load(write(tmp_path, "modelopt", content_of("modelopt"))).hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_compileable
    assert not quantizer.is_trainable


def test_dequantize_makes_the_model_that_the_weights_stand_for(tmp_path: Path) -> None:
    content = content_of("modelopt")
    model = load(write(tmp_path / "mxfp8", "modelopt", content))
    assert model.dequantize() is model
    assert_same_state(model, load(write_dense(tmp_path / "dense", content)))
    assert not hasattr(model, "hf_quantizer")


def test_a_loaded_model_compiles(tmp_path: Path) -> None:
    content = content_of("modelopt", llama(num_hidden_layers=1, attention_bias=False))
    model = load(write(tmp_path, "modelopt", content))
    expected, actual = logits(model).float(), logits(torch.compile(model, backend="mxfp8")).float()
    assert (actual - expected).norm() < 0.02 * expected.norm()
