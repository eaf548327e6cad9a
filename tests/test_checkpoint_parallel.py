"""Loading over several ranks, and how much memory loading takes: both in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import dialects
import loading_worker
import pytest
import torch
from dialects import Content, Layer
from helpers import assert_same, exact_linear_inputs
from torch import Tensor, nn

from mxfp8_ops.checkpoint import TensorParallel, load_into, open_checkpoint

RANKS = 2
SLACK = 6 * 2**20


def integers(n: int, k: int) -> Layer:
    _, weight, scale, bias = exact_linear_inputs(3, n, k, torch.bfloat16)
    return Layer(weight, (scale.long() % 2 + 127).to(torch.uint8), bias)


@pytest.fixture(scope="module")
def content() -> Content:
    """Small integers: sums have the same bits in any order."""
    layers = {"block.gate_proj": integers(64, 64), "block.up_proj": integers(64, 64), "block.down": integers(64, 64)}
    plain = {}
    for name, n, k in (("wide", 32, 64), ("narrow", 64, 32)):
        plain[f"block.{name}.weight"] = torch.randint(-2, 3, (n, k)).bfloat16()
        plain[f"block.{name}.bias"] = torch.randint(-2, 3, (n,)).bfloat16()
    plain |= {"block.norm.weight": torch.randn(64).bfloat16(), "block.norm.bias": torch.randn(64).bfloat16()}
    return Content(layers, plain)


def x() -> Tensor:
    return torch.randint(0, 2, (5, 64), generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(scope="module")
def found(content: Content, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each rank has and computes."""
    folder = tmp_path_factory.mktemp("ranks")
    dialects.WRITERS["mxfp8"](folder / "checkpoint", content, shards=2)
    torch.save(x(), folder / "x.pt")
    command = [sys.executable, loading_worker.__file__, "ranks", str(folder)]
    started = [subprocess.Popen([*command, str(rank), str(RANKS)]) for rank in range(RANKS)]
    assert [each.wait(timeout=300) for each in started] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture
def whole(content: Content, tmp_path: Path) -> nn.Module:
    model = loading_worker.Model()
    load_into(model, open_checkpoint(dialects.WRITERS["mxfp8"](tmp_path / "checkpoint", content)))
    return model.block


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_two_ranks_compute_together_what_the_whole_model_does(
    way: str, found: list[dict[str, Tensor]], whole: nn.Module
) -> None:
    with torch.no_grad():
        expected = whole(x())
    for each in found:
        assert_same(each[way][:, 1:], expected[:, 1:])
    assert_same(found[0][way][:, 0] + found[1][way][:, 0], expected[:, 0])  # gates, of which each rank has a part


def test_weights_and_scales_are_split_alike_and_all_parts_together_are_the_whole(
    found: list[dict[str, Tensor]], content: Content
) -> None:
    gate, up, down = (content.layers[f"block.{name}"] for name in ("gate_proj", "up_proj", "down"))
    for rank, each in enumerate(found):
        rows, columns, blocks = (slice(rank * n // 2, (rank + 1) * n // 2) for n in (64, 64, 2))
        for key, part in (("weight", gate.weight), ("weight_scale", gate.scale), ("bias", gate.bias)):
            other = {"weight": up.weight, "weight_scale": up.scale, "bias": up.bias}[key]
            joined = torch.cat(
                [part.view(torch.uint8)[byte_rows(part, rows)], other.view(torch.uint8)[byte_rows(other, rows)]]
            )
            assert_same(each[f"block.gate_up_proj.{key}"], joined)
        assert_same(each["block.down.weight"], down.weight.view(torch.uint8)[:, columns])
        assert_same(each["block.down.weight_scale"], down.scale[:, blocks])
        assert ("block.down.bias" in each) == (rank == 0)  # one rank adds it, before outputs are summed up
        assert_same(each["block.norm.weight"], content.plain["block.norm.weight"].view(torch.uint8))


def byte_rows(tensor: Tensor, rows: slice) -> slice:
    """The same rows of a vector seen as bytes."""
    size = tensor.element_size() if tensor.dim() == 1 else 1
    return slice(rows.start * size, rows.stop * size)


@pytest.mark.parametrize(
    ("plan", "ranks", "message"),
    [
        ({"block.down": "rowwise"}, 4, "K = 64 of block.down cannot be split into whole blocks of 32.* over 4 ranks"),
        ({"block.down": "rowwise"}, 3, "K = 64 of block.down cannot be split"),
        ({"block.gate_up_proj": "colwise"}, 3, "the 64 rows of block.gate_up_proj cannot be split over 3 ranks"),
        ({"block.wide": "colwise"}, 5, "the 32 rows of block.wide cannot be split over 5 ranks"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_is_read(
    plan: dict[str, str], ranks: int, message: str, content: Content, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(dialects.WRITERS["mxfp8"](tmp_path / "checkpoint", content))
    model = loading_worker.Model()
    with (
        patch.multiple(TensorParallel, rank=0, ranks=ranks),
        patch.object(type(checkpoint.files), "read", side_effect=AssertionError),
        pytest.raises(ValueError, match=message),
    ):
        load_into(model, checkpoint, parallel=TensorParallel(plan))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_plan_of_other_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'colwise' or 'rowwise', got \['replicate'\]"):
        TensorParallel({"*": "replicate"})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    n, k = loading_worker.N, loading_worker.K
    layers = {}
    for i in range(loading_worker.LAYERS):
        codes = torch.randint(0, 127, (n, k), dtype=torch.uint8)
        layers[str(i)] = Layer(codes.view(torch.float8_e4m3fn), torch.full((n, k // 32), 120, dtype=torch.uint8))
    return dialects.WRITERS["modelopt"](tmp_path_factory.mktemp("large") / "checkpoint", Content(layers), shards=3)


def over(large: Path, kind: str) -> int:
    """How many bytes more than the loaded model loading took at its peak."""
    command = [sys.executable, loading_worker.__file__, "memory", str(large), kind]
    # A tensor that is freed is gone at once: by default glibc keeps some, the more the larger they were.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    model, peak = map(int, done.stdout.split())
    assert model == loading_worker.LAYERS * loading_worker.N * loading_worker.K * (
        2 if kind == "dequantized" else 33 / 32
    )
    return peak - model


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_model_and_of_one_tensor(large: Path) -> None:
    one = loading_worker.N * loading_worker.K
    assert over(large, "kept") < one + SLACK
    assert over(large, "dequantized") < 2 * one + SLACK  # one tensor is bfloat16 there
    assert over(large, "naive") > 4 * one  # the measure tells
