"""Checkpoints on a CUDA device: loaded there, by ``load_into`` and by transformers."""

from __future__ import annotations

from pathlib import Path

import dialects
import pytest
import torch
from helpers import assert_same
from llamas import dense, empty, generate, llama, write
from torch import nn

from mxfp8_ops import Mxfp8Linear
from mxfp8_ops.checkpoint import load_into, open_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = torch.arange(40, 52)[None]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama(num_hidden_layers=1, initializer_range=0.2, attention_bias=False, head_dim=32)


@pytest.fixture(scope="module")
def content(model: nn.Module) -> dialects.Content:
    return dialects.llama_content(model)


def tokens(model: nn.Module) -> list[int]:
    return generate(lambda ids: model(ids.cuda(), use_cache=False).logits, IDS, 8)


@pytest.mark.parametrize("dialect", dialects.WRITERS)
def test_every_dialect_is_loaded_to_the_device_and_says_there_what_its_dequantized_weights_say(
    dialect: str, model: nn.Module, content: dialects.Content, tmp_path: Path
) -> None:
    content = dialects.sayable(dialect, content)
    checkpoint = open_checkpoint(write(tmp_path / dialect, dialect, content))
    kept, folded = empty(model), empty(model)
    load_into(kept, checkpoint, device="cuda")
    load_into(folded, checkpoint, device="cuda", dequant_at_load=True)
    expected = dense(model, content).cuda()
    for name, layer in content.layers.items():
        module = kept.get_submodule(name)
        assert type(module) is Mxfp8Linear
        assert_same(module.weight, layer.weight.cuda())
        assert_same(module.weight_scale, layer.scale.cuda())
        assert_same(folded.get_submodule(name).weight, expected.get_submodule(name).weight)
    said = tokens(expected)
    assert tokens(kept.cuda()) == said  # the device also for buffers that no checkpoint has
    assert tokens(folded.cuda()) == said


def test_loading_takes_the_device_memory_of_the_model_and_of_one_tensor(tmp_path: Path) -> None:
    n, k, count = 2048, 2048, 8
    layers = {}
    for i in range(count):
        codes = torch.randint(0, 127, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
        layers[str(i)] = dialects.Layer(codes, torch.full((n, k // 32), 120, dtype=torch.uint8))
    checkpoint = open_checkpoint(write(tmp_path / "checkpoint", "modelopt", dialects.Content(layers), shards=2))
    for dequant_at_load, size in ((False, n * k * 33 // 32), (True, n * k * 2)):
        stack = nn.Sequential(*(nn.Linear(k, n, bias=False, device="meta") for _ in range(count)))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        load_into(stack, checkpoint, dequant_at_load=dequant_at_load, device="cuda")
        assert torch.cuda.max_memory_allocated() - before <= (count + 1) * size


@pytest.mark.parametrize("dialect", ["modelopt", "mxfp8", "fp8-32x32", "compressed-tensors", "quark-per-block"])
@pytest.mark.parametrize("dequant_at_load", [False, True])
def test_from_pretrained_loads_to_the_device(
    dialect: str, dequant_at_load: bool, model: nn.Module, content: dialects.Content, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    plugin = pytest.importorskip("mxfp8_ops.transformers")
    from transformers import AutoModelForCausalLM

    content = dialects.sayable(dialect, content)
    folder = write(tmp_path / dialect, dialect, content)
    config = plugin.Mxfp8Config(dequant_at_load=dequant_at_load)
    with plugin.take_over():
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", quantization_config=config)
    kind = nn.Linear if dequant_at_load else Mxfp8Linear
    assert {type(loaded.get_submodule(name)) for name in content.layers} == {kind}
    assert all(parameter.is_cuda for parameter in loaded.parameters())
    assert tokens(loaded) == tokens(dense(model, content).cuda())
