"""The account of a graph: which weights are folded, kept or unmatched, why, and which linears are not MXFP8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import folding, layer, rows
from torch import Tensor, nn

import mxfp8_ops
from lowering import report
from lowering.report import GraphReport, Memory, WeightReport


def account(model: Callable[..., object], *inputs: Tensor, **options: bool) -> GraphReport:
    torch._dynamo.reset()
    with report.collect() as graphs, torch.no_grad():
        torch.compile(model, backend=folding(**options), fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


class Weight(nn.Module):
    """One packed weight and a way to use it."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.use = use
        weight, scale = mxfp8_ops.quantize(torch.randn(shape or (48, 64)))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight, self.weight_scale)


def emulated(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """Dequantization as others write it out, on a plain linear."""
    scales = torch.exp2(s.view(torch.uint8).float() - 127).unsqueeze(-1)
    return F.linear(x, (w.float().unflatten(-1, (-1, 32)) * scales).flatten(-2).to(x.dtype))


IN_EVERY_CALL = "dequantized in every call"


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda x, w, s: x @ mxfp8_ops.dequant(w, s).T, f"{IN_EVERY_CALL} for matmul, which is not linear"),
        (lambda x, w, s: mxfp8_ops.dequant(w, s).sum(-1), f"{IN_EVERY_CALL} for sum, which is not linear"),
        (lambda x, w, s: mxfp8_ops.dequant(w, s), f"{IN_EVERY_CALL}: the result leaves the graph"),
        (
            lambda x, w, s: F.linear(x.float(), mxfp8_ops.dequant(w, s, torch.bfloat16).float()),
            "rounded to bfloat16 before the cast to float32, unlike linear, which rounds once: ask dequant for float32",
        ),
    ],
)
def test_dequant_that_no_linear_takes_is_unmatched_and_says_why(use: Callable[..., Tensor], why: str) -> None:
    (row,) = account(Weight(use), rows()).weights
    assert (row.name, row.action) == ("weight", "unmatched")
    assert row.reason == f"{why}; not folded: the flag is not on"
    assert row.bytes_after == row.bytes_before == 48 * 64 + 48 * 2


def test_stack_of_experts_is_unmatched_for_its_dimensions() -> None:
    model = Weight(lambda x, w, s: x @ mxfp8_ops.dequant(w, s).mT, 4, 24, 64)
    (row,) = account(model, rows()).weights
    assert row.reason.startswith(f"{IN_EVERY_CALL} for matmul: linear takes [N, K], not 3 dimensions; not folded")


def test_unmatched_dequant_is_folded_when_the_flag_is_on() -> None:
    model = Weight(lambda x, w, s: x @ mxfp8_ops.dequant(w, s).T)
    (row,) = account(model, rows(), dequant_at_load=True).weights
    assert (row.action, row.reason) == ("folded", "dequantized to bfloat16")


@pytest.mark.parametrize("flag", [True, False])
def test_written_out_emulation_is_unmatched_whatever_the_flag(flag: bool) -> None:
    graph = account(Weight(emulated), rows(), dequant_at_load=flag)
    (row,) = graph.weights
    assert (row.name, row.action, row.kernel) == ("weight", "unmatched", "linear")
    assert row.reason == "read by float, no operator of this package: use mxfp8_ops.linear(x, weight, scale)"
    assert graph.plain == []  # its weight is computed in the graph


def test_float8_without_block_scales_is_no_mxfp8_weight() -> None:
    class PerTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Buffer(torch.randn(48, 64).to(torch.float8_e4m3fn))
            self.scale = nn.Buffer(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, (self.weight.to(x.dtype) * self.scale).to(x.dtype))

    assert account(PerTensor(), rows()).weights == []


def test_weight_read_by_linear_and_by_dequant_is_unmatched() -> None:
    model = Weight(lambda x, w, s: mxfp8_ops.linear(x, w, s) + x @ mxfp8_ops.dequant(w, s).T)
    (row,) = account(model, rows()).weights
    assert row.action == "unmatched"
    assert row.kernel == "mxfp8.linear (reference) + mxfp8.dequant (reference) + matmul"


def test_expert_of_a_stack_is_named_by_its_index_and_linked_to_its_own_nodes() -> None:
    def use(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return mxfp8_ops.linear(x, w[1], s[1]) + mxfp8_ops.linear(x, w[2], s[2])

    graph = account(Weight(use, 3, 24, 64), rows(), dequant_at_load=True)
    assert [row.name for row in graph.weights] == ["weight[1]", "weight[2]"]
    reads = {line.weights: line.text for line in graph.lines("after") if line.reads}
    assert reads == {
        ("weight[1]",): "linear: bf16[5, 24] = linear(x, weight[1].dequantized, None)",
        ("weight[2]",): "linear_1: bf16[5, 24] = linear(x, weight[2].dequantized, None)",
    }


def test_linears_that_are_not_mxfp8_are_listed_once_with_their_bytes() -> None:
    dense = nn.Linear(48, 24).bfloat16()
    (plain,) = account(nn.Sequential(layer(), dense, nn.Unflatten(-1, (1, 24))), rows()).plain
    assert (plain.name, plain.shape, plain.dtype, plain.nbytes) == ("1.weight", (24, 48), "bfloat16", 24 * 48 * 2)


def test_dequantized_linears_count_as_not_mxfp8() -> None:
    model = nn.Sequential(layer())
    mxfp8_ops.dequantize_at_load_(model)
    graph = account(model, rows())
    assert graph.weights == []
    assert [each.name for each in graph.plain] == ["0.weight"]


def test_every_line_of_a_weight_is_linked_up_to_the_one_that_reads_it() -> None:
    graph = account(Weight(emulated), rows())
    linked = [line.target for line in graph.lines("before") if line.weights == ("weight",) and line.target]
    assert linked[0] == ".view"
    assert linked[-1] == "linear"
    assert [line.reads for line in graph.lines("before") if line.weights].count(True) == 1


def test_peak_memory_counts_a_copy_before_its_packed_bytes_are_released() -> None:
    def row(before: int, after: int, dequantized: int) -> WeightReport:
        return WeightReport("w", (1, 1), "folded", "", before, after, bytes_dequantized=dequantized)

    assert report.memory([row(10, 30, 20), row(10, 30, 20)]) == Memory(before=20, peak=60, after=60)
    assert report.memory([row(10, 20, 20), row(10, 20, 20)]) == Memory(before=20, peak=50, after=40)
    assert report.memory([WeightReport("w", (1, 1), "kept", "", 10, 10)]) == Memory(10, 10, 10)


def test_one_tensor_is_one_weight_whatever_two_graphs_call_it() -> None:
    shared = layer(64, 64)
    models = [nn.Sequential(shared), nn.ModuleDict({"inner": shared})]
    graphs = [account(models[0], rows()), account(lambda x: models[1]["inner"](x), rows())]
    names = [graph.weights[0].name for graph in graphs]
    assert names == ["0.weight", "inner.weight"] or names == ["0.weight", "models.1.inner.weight"]
    assert [row.name for row in report.distinct(graphs)] == names[1:]
