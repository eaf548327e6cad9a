"""from_pretrained of float checkpoints with an Mxfp8Config: quantized weight by weight, as quantize_ would do it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from helpers import assert_same

transformers = pytest.importorskip("transformers")
pytest.importorskip("mxfp8_ops.transformers")

from llamas import assert_same_state, kinds, llama, load, logits  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

import mxfp8_ops  # noqa: E402
from mxfp8_ops import Mxfp8Linear, environment, functional  # noqa: E402
from mxfp8_ops.transformers import Mxfp8Config, operations  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "bfloat16")
    return tmp_path / "bfloat16"


def quantized(model: nn.Module) -> list[str]:
    return [name for name, kind in kinds(model).items() if kind == "Mxfp8Linear"]


@pytest.mark.parametrize("rule", ["rceil", "floor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_float_checkpoint_becomes_what_quantize_makes_of_it(rule: str, dtype: torch.dtype, folder: Path) -> None:
    model = load(folder, dtype=dtype, quantization_config=Mxfp8Config(rule=rule))
    expected = load(folder, dtype=dtype)
    mxfp8_ops.quantize_(expected, lambda module, name: name != "lm_head", rule)
    assert len(quantized(model)) == 14
    assert_same_state(model, expected)
    assert_same(logits(model), logits(expected))


def test_the_dtype_that_was_asked_for_is_quantized_not_that_of_the_file(tmp_path: Path) -> None:
    llama().float().save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp8Config())
    expected = load(tmp_path, dtype=torch.bfloat16)
    mxfp8_ops.quantize_(expected, lambda module, name: name != "lm_head")
    assert_same_state(model, expected)


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["q_proj"], {"q_proj"}),
        (["proj"], set()),
        (["model.layers.0"], {"layers.0"}),
        (["*.mlp.*", "lm_head"], {"mlp", "lm_head"}),
        ([], set()),
    ],
)
def test_modules_to_not_convert_are_left(patterns: list[str], left: set[str], folder: Path) -> None:
    model = load(folder, quantization_config=Mxfp8Config(modules_to_not_convert=patterns))
    names = quantized(model)
    assert names == [name for name in kinds(model) if not any(f".{each}." in f".{name}." for each in left)]


def test_a_dict_of_options_is_as_good_as_a_config(folder: Path) -> None:
    options = {"quant_method": "mxfp8_ops", "rule": "floor", "modules_to_not_convert": ["k_proj", "lm_head"]}
    model = load(folder, quantization_config=options)
    assert len(quantized(model)) == 12
    expected = functional.quantize(llama().model.layers[1].mlp.down_proj.weight.detach(), "floor")
    assert_same(model.model.layers[1].mlp.down_proj.weight_scale, expected[1])


def test_one_config_serves_many_models(folder: Path, tmp_path: Path) -> None:
    config = Mxfp8Config(rule="floor", dequant_at_load=False)
    before = copy.deepcopy(config)
    load_one = transformers.LlamaForCausalLM.from_pretrained  # as it is, where AutoModel copies it
    first = load_one(folder, quantization_config=config)
    first.save_pretrained(tmp_path / "saved")
    assert config == before != Mxfp8Config()
    assert_same_state(load_one(folder, quantization_config=config), first)
    assert_same_state(load_one(folder, quantization_config=first.config.quantization_config), first)


def test_tied_embeddings_are_left_whatever_the_options_say(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=Mxfp8Config(modules_to_not_convert=[]))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(quantized(model)) == 14


def test_linears_that_are_no_whole_blocks_are_left_and_said_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llama(intermediate_size=100).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "mxfp8_ops"):
        model = load(tmp_path, quantization_config=Mxfp8Config())
    assert [name for name in kinds(model) if name not in quantized(model)] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("mxfp8_ops")]
    assert message.startswith("2 linears are not quantized, model.layers.0.mlp.down_proj among them")
    assert message.endswith("in_features 100 is not a multiple of 32")


def test_a_head_that_is_not_in_the_checkpoint_is_made_by_transformers(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=Mxfp8Config(modules_to_not_convert=[])
    )
    assert type(model.score) is nn.Linear
    assert 0 < model.score.weight.std() < 0.1
    assert len(quantized(model)) == 14


def test_experts_are_left_in_bfloat16(tmp_path: Path) -> None:
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "dtype": "bfloat16"}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=Mxfp8Config())
    assert_same(loaded.model.layers[0].mlp.experts.down_proj.detach(), model.model.layers[0].mlp.experts.down_proj)
    assert len(quantized(loaded)) == 4


def test_with_the_flag_on_weights_are_rounded_to_mxfp8_and_dense(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.KERNELS, "off")
    kept = load(folder, quantization_config=Mxfp8Config())
    monkeypatch.setenv(environment.DEQUANT_AT_LOAD[0], "on")
    dense = load(folder, quantization_config=Mxfp8Config())
    assert set(kinds(dense).values()) == {"Linear"}
    assert_same(logits(dense), logits(kept))
    assert_same_state(dense, kept.dequantize())
    assert not hasattr(dense, "hf_quantizer")


def test_one_weight_at_a_time_is_in_bfloat16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is quantized, those before it are bytes already, and those after it have not been read."""
    seen = []
    quantize = operations.Quantize.convert

    def watched(self: operations.Quantize, *args: object, **kwargs: object) -> object:
        model = kwargs["model"]
        assert isinstance(model, nn.Module)
        layers = [module for module in model.modules() if isinstance(module, Mxfp8Linear)]
        seen.append({str(layer.weight.dtype) for layer in layers})
        assert len(self.plan.loaded) == sum(not layer.weight.is_meta for layer in layers)
        return quantize(self, *args, **kwargs)

    monkeypatch.setattr(operations.Quantize, "convert", watched)
    load(folder, quantization_config=Mxfp8Config())
    assert seen == [{"torch.float8_e4m3fn"}] * 14
