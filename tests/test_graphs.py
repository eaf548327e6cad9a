"""The canonical graphs, as text; regenerate with EXPECTTEST_ACCEPT=1."""

from __future__ import annotations

import torch
from expecttest import TestCase
from models import layer, rows
from torch import nn

import lowering
from lowering import report


class TestCanonicalGraphs(TestCase):
    def graphs(self, flag: bool | None, freezing: bool = False, **compile_options: object) -> report.GraphReport:
        torch._dynamo.reset()
        model = nn.Sequential(layer(48, 64), nn.ReLU())
        if flag is not None:
            compile_options = {"backend": "mxfp8", "options": {"dequant_at_load": flag}} | compile_options
        with (
            report.collect() as graphs,
            torch.no_grad(),
            torch._inductor.config.patch(freezing=freezing, force_disable_caches=True),
        ):
            torch.compile(model, fullgraph=True, **compile_options)(rows(5, 64))
        (graph,) = graphs
        return graph

    def test_flag_off_keeps_one_opaque_linear_on_the_packed_weight(self) -> None:
        graph = self.graphs(False)
        assert graph.before == graph.after
        self.assertExpectedInline(
            graph.after,
            """\
input 0.weight: f8e4m3fn[48, 64]
input 0.weight_scale: u8[48, 2]
input 0.bias: bf16[48]
input args.0: bf16[5, 64]
linear: bf16[5, 48] = mxfp8.linear(args.0, 0.weight, 0.weight_scale, 0.bias)
relu: bf16[5, 48] = relu(linear, inplace=False)
return (relu,)""",
        )
        self.assertExpectedInline(
            graph.post_grad[0],
            """\
input 0.weight: f8e4m3fn[48, 64]
input 0.weight_scale: u8[48, 2]
input 0.bias: bf16[48]
input args.0: bf16[5, 64]
linear: bf16[5, 48] = mxfp8.linear(args.0, 0.weight, 0.weight_scale, 0.bias)
relu: bf16[5, 48] = aten.relu(linear)
return (relu,)""",
        )

    def test_flag_on_makes_the_dequantized_weight_an_input(self) -> None:
        graph = self.graphs(True)
        self.assertExpectedInline(
            graph.after,
            """\
input 0.bias: bf16[48]
input args.0: bf16[5, 64]
input 0.weight.dequantized: bf16[48, 64]
linear: bf16[5, 48] = linear(args.0, 0.weight.dequantized, 0.bias)
relu: bf16[5, 48] = relu(linear, inplace=False)
return (relu,)""",
        )
        self.assertExpectedInline(
            graph.post_grad[0],
            """\
input 0.bias: bf16[48]
input args.0: bf16[5, 64]
input 0.weight.dequantized: bf16[48, 64]
permute: bf16[64, 48] = aten.permute(0.weight.dequantized, [1, 0])
addmm: bf16[5, 48] = aten.addmm(0.bias, args.0, permute)
relu: bf16[5, 48] = aten.relu(addmm)
return (relu,)""",
        )

    def test_flag_on_under_freezing_makes_it_a_constant(self) -> None:
        graph = self.graphs(True, freezing=True)
        assert graph.before == graph.after
        self.assertExpectedInline(
            graph.post_grad[0],
            """\
constant 0.bias: bf16[48]
input args.0: bf16[5, 64]
constant 0.weight.dequantized: bf16[64, 48]
addmm: bf16[5, 48] = aten.addmm(0.bias, args.0, 0.weight.dequantized)
relu: bf16[5, 48] = aten.relu(addmm)
return (relu,)""",
        )

    def test_flag_off_under_freezing_keeps_the_packed_constants(self) -> None:
        graph = self.graphs(False, freezing=True)
        self.assertExpectedInline(
            graph.post_grad[0],
            """\
constant 0.weight: f8e4m3fn[48, 64]
constant 0.bias: bf16[48]
constant 0.weight_scale: u8[48, 2]
input args.0: bf16[5, 64]
linear: bf16[5, 48] = mxfp8.linear(args.0, 0.weight, 0.weight_scale, 0.bias)
relu: bf16[5, 48] = aten.relu(linear)
return (relu,)""",
        )

    def test_options_under_freezing_give_the_graph_of_the_backend(self) -> None:
        graph = self.graphs(None, freezing=True, options=lowering.options(dequant_at_load=True))
        of_backend = self.graphs(True, freezing=True)
        for stage in ("after", "post-grad"):
            targets, expected = ([line.target for line in each.lines(stage)] for each in (graph, of_backend))
            assert targets == expected
        if torch.__version__ >= "2.12":  # until 2.11 Dynamo's names are lost when a frozen graph is traced again
            assert graph.post_grad == of_backend.post_grad

    def test_enabled_process_gives_the_graphs_of_the_backend(self) -> None:
        for flag in (True, False):
            for freezing in (True, False):
                lowering.enable(dequant_at_load=flag)
                try:
                    enabled = self.graphs(None, freezing=freezing)
                finally:
                    lowering.disable()
                backend = self.graphs(flag, freezing=freezing)
                assert (enabled.after, enabled.post_grad) == (backend.after, backend.post_grad)
                assert enabled.weights == backend.weights
