"""Packed weights inside compiled graphs on a Hopper chip: nothing copied, nothing compiled twice, nothing stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same
from models import Chain, layer, rows
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import mxfp8_ops
from lowering import released, report
from mxfp8_ops import Mxfp8Linear, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not ops.reads_packed(torch.device("cuda", 0)), reason="needs a Hopper chip"
    ),
]
MODES = pytest.mark.parametrize("mode", ["default", "reduce-overhead"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(model: nn.Module, mode: str = "default", **options: Any) -> Any:
    """As ``mode`` has it: torch takes a mode or options, not both."""
    if mode == "reduce-overhead":
        options["triton.cudagraphs"] = True
    return torch.compile(model, backend="mxfp8", fullgraph=True, options={"dequant_at_load": False, **options})


def random_layer(n: int, k: int) -> Mxfp8Linear:
    return Mxfp8Linear.from_float(torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * k**-0.5)


class Block(nn.Module):
    """The linears of a Llama layer, with a pointwise function in the place of attention."""

    def __init__(self, hidden: int = 512, kv: int = 128, intermediate: int = 1408) -> None:
        super().__init__()
        self.q, self.k, self.v = random_layer(hidden, hidden), random_layer(kv, hidden), random_layer(kv, hidden)
        self.o = random_layer(hidden, hidden)
        self.gate, self.up = random_layer(intermediate, hidden), random_layer(intermediate, hidden)
        self.down = random_layer(hidden, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(q * (k * v).sum(-1, keepdim=True).tanh())
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@MODES
def test_a_packed_weight_gives_the_bits_of_the_reference(mode: str) -> None:
    for m in (1, 5, 20, 70, 300):
        model = layer(300, 288)
        expected = model(rows(m, 288))
        run = compiled(model.cuda(), mode)
        with report.collect() as graphs:
            for _ in range(3):  # CUDA graphs are recorded at the second call
                assert_same(run(rows(m, 288).cuda()).cpu(), expected)
        assert graphs[0].weights[0].kernel == "mxfp8.linear_packed (cuda)"
        torch._dynamo.reset()


def test_a_step_under_cuda_graphs_copies_no_weight_and_replays_see_changes() -> None:
    model, x = Chain().cuda(), rows().cuda()
    run = compiled(model, "reduce-overhead")
    for _ in range(3):
        actual = run(x).clone()
    assert_same(actual.cpu(), Chain()(rows()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(x)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events()]
    assert len([name for name in kernels if "Memcpy" in name or "Copy<" in name]) <= 1, kernels  # x itself
    assert any(name.startswith("mxfp8_linear_") for name in kernels), kernels
    model.up.weight_scale.add_(1)
    torch.compiler.cudagraph_mark_step_begin()
    assert_same(run(x).cpu(), model(x).cpu())
    model.up.weight.view(torch.uint8).bitwise_xor_(0x80)
    torch.compiler.cudagraph_mark_step_begin()
    assert_same(run(x).cpu(), model(x).cpu())


def test_one_graph_serves_every_number_of_rows() -> None:
    model = layer(300, 288).cuda()
    run = torch.compile(model, backend="mxfp8", fullgraph=True, dynamic=True, options={"dequant_at_load": False})
    with report.collect() as graphs:
        for m in (2, 3, 8, 9, 33, 65, 129, 300):
            assert_same(run(rows(m, 288).cuda()), model(rows(m, 288).cuda()))
    assert len(graphs) == 1


@MODES
def test_generated_code_calls_the_kernels_without_the_dispatcher(mode: str) -> None:
    model = layer(300, 288).cuda()
    for pack, name in ((True, "mxfp8_linear_packed_cuda"), (False, "mxfp8_linear_cuda")):
        with torch._inductor.config.patch(force_disable_caches=True):
            run = compiled(model, mode, pack_at_load=pack)
            for m in (1, 20):
                actual, code = run_and_get_code(run, rows(m, 288).cuda())
                actual = actual.clone()  # a CUDA graph writes to the same memory again
                assert_same(actual, model(rows(m, 288).cuda()))
                assert sum(each.count(f"extern_kernels.{name}(") for each in code) == 1
                for _ in range(3):  # the launches that are made again
                    assert_same(run(rows(m, 288).cuda()), actual)
        torch._dynamo.reset()


def test_release_leaves_one_byte_a_weight() -> None:
    model = random_layer(1024, 1024)
    expected = model(rows(5, 1024).cuda())
    before = torch.cuda.memory_allocated()
    run = compiled(model, release_quantized=True)
    actual = run(rows(5, 1024).cuda())
    assert released.is_released(model.weight)
    torch.testing.assert_close(actual, expected)
    del actual
    assert torch.cuda.memory_allocated() - before <= 2**15


@pytest.mark.parametrize("m", [1, 16, 100])
def test_merged_linears_have_the_error_of_one_rounding(m: int) -> None:
    model, x = Block(), torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
    merged, apart = compiled(model)(x), None
    torch._dynamo.reset()
    with report.collect() as graphs:
        apart = compiled(model, merge_linears=False)(x)
    assert not any("one linear with" in row.reason for row in graphs[0].weights)
    torch._dynamo.reset()
    with report.collect() as graphs:
        assert_same(compiled(model)(x), merged)  # the same bits again
    assert sum("one linear with" in row.reason for row in graphs[0].weights) == 5
    assert (merged.float() - apart.float()).norm() / apart.float().norm() < 4e-3  # two roundings to bfloat16


def test_freezing_packs_constants() -> None:
    model, x = Chain().cuda(), rows().cuda()
    with torch._inductor.config.patch(freezing=True), report.collect() as graphs:
        run = compiled(model)
        assert_same(run(x).cpu(), Chain()(rows()))
    assert all(row.bytes_packed for row in graphs[0].weights)
    model.up.weight_scale.add_(1)
    assert_same(run(x).cpu(), model(x).cpu())


def test_a_packed_and_a_canonical_weight_have_the_same_bits_for_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(8).view(256, 8)
    weight = codes.view(torch.float8_e4m3fn)
    model = Mxfp8Linear.from_quantized(weight, scale).cuda()
    x = torch.eye(256, dtype=torch.bfloat16, device="cuda")[:, :]
    x[~x.bool()] = 0
    expected = mxfp8_ops.linear(x, model.weight, model.weight_scale)
    assert_same(compiled(model)(x), expected)
