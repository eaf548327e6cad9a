"""Real weights: all-MiniLM-L6-v2 converted by the command, and loaded in both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from helpers import assert_same
from torch import Tensor, nn

import mxfp8_ops.transformers as plugin
from lowering.inspect.targets import demo_folder
from mxfp8_ops import Mxfp8Linear, environment, reference
from mxfp8_ops.checkpoint import load_into, open_checkpoint
from mxfp8_ops.checkpoint.converting import cli

FORMATS = ["modelopt", "mxfp8", "compressed-tensors"]
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return transformers.AutoModel.from_pretrained(demo_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder())
    sentences = ["Bake the bread for forty minutes.", "Voyager 1 is the most distant object that people have made."]
    return tokenizer(sentences, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def dequantized(bert: nn.Module) -> dict[str, Tensor]:
    """The weights of its linears, quantized and dequantized by the reference."""
    return {
        f"{name}.weight": reference.dequant(*reference.quantize(module.weight.detach()), torch.float32)
        for name, module in bert.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("format", FORMATS)
def test_minilm_converted_and_loaded_back_computes_what_its_dequantized_weights_do(
    format: str, bert: nn.Module, batch: dict[str, Tensor], dequantized: dict[str, Tensor], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert cli.main([str(demo_folder()), str(tmp_path / "out"), "--to", format, "--verify"]) == 0
    ways = {"from_pretrained": from_pretrained(tmp_path / "out"), "load_into": loaded(bert, tmp_path / "out")}
    expected = by_transformers(bert.config)
    expected.load_state_dict(bert.state_dict() | dequantized, assign=True)
    monkeypatch.setenv(environment.KERNELS, "off")
    with torch.no_grad():
        wanted, original = (model(**batch).last_hidden_state for model in (expected, bert))
        for model in ways.values():
            assert sum(isinstance(each, Mxfp8Linear) for each in model.modules()) == len(dequantized) == 37
            assert_same(model(**batch).last_hidden_state, wanted)
    similarity = nn.functional.cosine_similarity(wanted.flatten(1), original.flatten(1))
    assert 0.98 < similarity.min() < 1


def from_pretrained(folder: Path) -> Any:
    with plugin.take_over():
        return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def by_transformers(config: Any) -> Any:
    """A model whose parameters are on the meta device."""
    with accelerate.init_empty_weights(include_buffers=False):
        return transformers.AutoModel.from_config(config).eval()


def loaded(bert: nn.Module, folder: Path) -> nn.Module:
    model = by_transformers(bert.config)
    summary = load_into(model, open_checkpoint(folder))
    assert {each.action for each in summary} == {"kept"}
    return model
