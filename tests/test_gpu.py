"""The same bits on a CUDA device as on the CPU, on every path."""

from __future__ import annotations

import re

import pytest
import torch
from compiling import one_code_a_row, what_codes_mean
from helpers import all_codes, assert_same, exact_linear_inputs, expected_from_float64
from models import Chain, layer, rows
from torch import Tensor, nn

import lowering
import mxfp8_ops
from lowering import released, report
from mxfp8_ops import ops, reference
from mxfp8_ops.gpu import replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLAGS = pytest.mark.parametrize("flag", [True, False], ids=["on", "off"])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_every_code_is_exact_on_the_device() -> None:
    weight, scale = all_codes()
    for dtype in DTYPES:
        actual = mxfp8_ops.dequant(weight.cuda(), scale.cuda(), dtype)
        assert_same(actual.cpu(), expected_from_float64(weight, scale, dtype))


@pytest.mark.parametrize("rows_of_x", [1, 3, 8, 16, 33, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_under_every_scale_goes_through_linear(dtype: torch.dtype, rows_of_x: int) -> None:
    weight, scale = one_code_a_row(range(256), 288)
    x = torch.ones(rows_of_x, 288, dtype=dtype, device="cuda")
    actual = mxfp8_ops.linear(x, weight.cuda(), scale.cuda())
    assert_same(actual.cpu(), what_codes_mean(weight, scale, dtype).expand(rows_of_x, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_exact_for_any_shape_and_strides(dtype: torch.dtype) -> None:
    for m in (0, 1, 2, 3, 5, 8, 9, 17, 33, 64, 65):
        for n, k in ((1, 32), (7, 96), (33, 288), (257, 1056), (64, 4096)):
            x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
            expected = reference.linear(x, weight, scale, bias)
            x, weight, scale, bias = (each.cuda() for each in (x, weight, scale, bias))
            assert_same(mxfp8_ops.linear(x, weight, scale, bias).cpu(), expected)
            strided = torch.stack([x, x], -1)[..., 0]
            transposed = weight.view(torch.uint8).T.contiguous().T.view(torch.float8_e4m3fn)
            assert_same(mxfp8_ops.linear(strided, transposed, scale, bias).cpu(), expected)
    assert mxfp8_ops.linear(x[0], weight, scale, bias).shape == (64,)


def test_sums_that_overflow_before_they_are_scaled_are_right() -> None:
    weight, scale = mxfp8_ops.quantize(torch.full((5, 64), 2.0**-100))
    x = torch.zeros(2, 64)
    x[0], x[1, 3] = 2.0**127, torch.inf
    expected = reference.linear(x, weight, scale)
    assert expected[0].isfinite().all()
    assert_same(mxfp8_ops.linear(x.cuda(), weight.cuda(), scale.cuda()).cpu(), expected)


def test_two_runs_have_equal_bits_and_the_error_of_a_bfloat16_product() -> None:
    weight, scale = mxfp8_ops.quantize(torch.randn(1000, 4096))
    x = torch.randn(64, 4096).bfloat16()
    exact = x.double() @ reference.dequant(weight, scale, torch.float32).double().T
    for m in (1, 2, 4, 16, 64):
        first, second = (mxfp8_ops.linear(x[:m].cuda(), weight.cuda(), scale.cuda()) for _ in range(2))
        assert_same(first, second)
        assert (first.cpu().double() - exact[:m]).norm() / exact[:m].norm() < 2e-3


def test_kernels_off_is_the_reference_with_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale, bias = (each.cuda() for each in exact_linear_inputs(2, 33, 288, torch.bfloat16))
    assert ops.kernel_name("linear", x.device) == "cuda"
    expected = mxfp8_ops.linear(x, weight, scale, bias), mxfp8_ops.dequant(weight, scale), *mxfp8_ops.quantize(x)
    monkeypatch.setenv("MXFP8_KERNELS", "off")
    assert ops.kernel_name("linear", x.device) == "reference"
    actual = mxfp8_ops.linear(x, weight, scale, bias), mxfp8_ops.dequant(weight, scale), *mxfp8_ops.quantize(x)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_that_are_only_launched_again_see_their_own_tensors(dtype: torch.dtype, m: int) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 300, 1056, dtype)
    canonical, scale_there = weight.cuda(), scale.cuda()
    packed = mxfp8_ops.pack(canonical, scale_there)
    replay.forget()
    kept = []
    for turn in range(replay.TRIES + 3):
        rows, offset = x.roll(turn, 0), bias.roll(turn)
        expected = reference.linear(rows, weight, scale, offset)
        there = rows.cuda(), offset.cuda()
        kept.append((mxfp8_ops.linear(there[0], canonical, scale_there, there[1]), expected))
        kept.append((mxfp8_ops.linear_packed(there[0], packed, 300, there[1]), expected))
        kept.append((mxfp8_ops.linear_packed(there[0][None], packed, 300, there[1])[0], expected))
        kept.append((mxfp8_ops.dequant(canonical, scale_there, dtype), expected_from_float64(weight, scale, dtype)))
    for actual, expected in kept:
        assert_same(actual.cpu(), expected)


@pytest.mark.parametrize("name", ["linear", "linear_packed", "dequant"])
def test_an_operator_with_little_to_do_is_only_launched_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("what is launched on other chips was not looked at")
    x, weight, scale, bias = (each.cuda() for each in exact_linear_inputs(1, 300, 1056, torch.bfloat16))
    packed = mxfp8_ops.pack(weight, scale)
    call = {
        "linear": lambda: mxfp8_ops.linear(x, weight, scale, bias),
        "linear_packed": lambda: mxfp8_ops.linear_packed(x, packed, 300, bias),
        "dequant": lambda: mxfp8_ops.dequant(weight, scale),
    }[name]
    for _ in range(replay.TRIES + 1):
        expected = call()
    monkeypatch.setattr(replay, "learn", None)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            assert_same(call(), expected)


@FLAGS
def test_every_code_is_exact_in_compiled_graphs(flag: bool) -> None:
    weight, scale = all_codes()
    module = nn.Module()
    module.weight = nn.Parameter(weight.cuda(), requires_grad=False)
    module.register_buffer("scale", scale.cuda())

    def model(one: Tensor) -> list[Tensor]:
        return [mxfp8_ops.dequant(module.weight, module.scale, dtype) * one.to(dtype) for dtype in DTYPES]

    compiled = torch.compile(model, backend="mxfp8", options={"dequant_at_load": flag}, fullgraph=True)
    for actual in compiled(torch.ones((), device="cuda")):
        assert_same(actual.cpu(), expected_from_float64(weight, scale, actual.dtype))


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_quantize_gives_the_bytes_of_the_cpu(rule: str) -> None:
    for dtype in DTYPES:
        x = (torch.randn(64, 128) * torch.logspace(-40, 30, 64)[:, None]).to(dtype)
        x[3, 7], x[5, 40], x[6] = torch.nan, torch.inf, 0
        for actual, expected in zip(mxfp8_ops.quantize(x.cuda(), rule), mxfp8_ops.quantize(x, rule), strict=True):
            assert_same(actual.cpu(), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@FLAGS
def test_linear_over_shapes_equals_the_cpu_reference(flag: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "1" if flag else "0")
    for n, k in ((1, 32), (7, 96), (64, 288)):
        for m in (1, 3, 17):
            x, weight, scale, bias = exact_linear_inputs(m, n, k, torch.bfloat16)
            expected = reference.linear(x, weight, scale, bias)
            model = mxfp8_ops.Mxfp8Linear.from_quantized(weight, scale, bias).cuda()
            with torch.no_grad():
                compiled = torch.compile(model, backend="mxfp8", mode=mode, fullgraph=True)
                for _ in range(3):  # CUDA graphs are recorded at the second call
                    assert_same(compiled(x.cuda()).cpu(), expected)
                assert_same(model(x.cuda()).cpu(), expected)
            torch._dynamo.reset()


def test_folded_weights_are_static_inputs_that_cuda_graphs_do_not_copy() -> None:
    model, x = Chain().cuda(), rows().cuda()
    with torch.no_grad():
        compiled = torch.compile(
            model, backend="mxfp8", options={"dequant_at_load": True, "triton.cudagraphs": True}, fullgraph=True
        )
        for _ in range(3):
            expected = compiled(x).clone()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(x)
            torch.cuda.synchronize()
        assert_same(expected.cpu(), Chain()(rows()))
        model.up.weight_scale.add_(1)  # a replay sees a refreshed weight
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(compiled(x).cpu(), model(x).cpu())
    kernels = [event.name for event in profile.events()]
    copies = [name for name in kernels if "Memcpy" in name or "Copy<" in name]  # torch's own, not Inductor's casts
    assert len(copies) <= 1, copies  # x itself


def test_release_frees_the_packed_bytes_on_the_device() -> None:
    model = layer(1024, 1024).cuda()
    expected = model(rows(5, 1024).cuda())
    nn.Linear(1024, 1024, dtype=torch.bfloat16, device="cuda")(rows(5, 1024).cuda())  # cuBLAS takes its workspaces
    before = torch.cuda.memory_allocated()
    with report.collect() as graphs, torch.no_grad():
        compiled = torch.compile(
            model, backend="mxfp8", options={"dequant_at_load": True, "release_quantized": True}, fullgraph=True
        )
        actual = compiled(rows(5, 1024).cuda())
    assert released.is_released(model.weight)
    del actual
    assert torch.cuda.memory_allocated() - before <= 2**20 + 2**15  # two bytes a weight instead of one
    assert_same(compiled(rows(5, 1024).cuda()).cpu(), expected.cpu())
    assert graphs[0].weights[0].bytes_after == 2 * 2**20


def test_folding_a_model_takes_the_memory_of_one_layer_more_at_most() -> None:
    side, layers = 4096, 4
    one, x = 2 * side * side, rows(16, side).cuda()
    for bias in (None, x.new_zeros(side)):  # cuBLAS takes its workspaces
        nn.functional.linear(x, x.new_zeros(side, side), bias)
    before = torch.cuda.memory_allocated()
    model = nn.Sequential(*(layer(side, side).cuda() for _ in range(layers)))
    torch.cuda.reset_peak_memory_stats()
    options = {"dequant_at_load": True, "release_quantized": True}
    with torch.no_grad():
        torch.compile(model, backend="mxfp8", options=options, fullgraph=True)(x)
    activations = 2**20
    assert torch.cuda.max_memory_allocated() - before <= (layers + 1) * one + activations
    assert torch.cuda.memory_allocated() - before <= layers * one + activations


@FLAGS
def test_autocast_on_the_device(flag: bool) -> None:
    model, x = layer(dtype=torch.float32).cuda(), rows(dtype=torch.float32).cuda()
    compiled = torch.compile(model, backend="mxfp8", options={"dequant_at_load": flag}, fullgraph=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            assert_same(compiled(x), model(x))
            assert model(x).dtype == dtype


@FLAGS
def test_freezing_on_the_device(flag: bool) -> None:
    model, x = Chain().cuda(), rows().cuda()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True), report.collect() as graphs:
        compiled = torch.compile(model, backend="mxfp8", options={"dequant_at_load": flag}, fullgraph=True)
        assert_same(compiled(x).cpu(), Chain()(rows()))
    assert {weight.action for weight in graphs[0].weights} == {"folded" if flag else "kept"}


@FLAGS
def test_explain_names_the_kernels_of_the_device(flag: bool) -> None:
    packed, kept = layer(64, 64).cuda(), layer(64, 64, seed=4).cuda()

    def model(x: Tensor) -> Tensor:
        return kept(x @ mxfp8_ops.dequant(packed.weight, packed.weight_scale).T)

    with torch.no_grad():
        found = lowering.explain(model, rows().cuda(), dequant_at_load=flag)
    assert {row.device for row in found.weights} == {"cuda:0"}
    kernels = {row.action: row.kernel for row in found.weights}
    if flag:
        assert kernels["folded"].startswith("extern_kernels.")
    else:
        name = "linear_packed" if ops.reads_packed(torch.device("cuda", 0)) else "linear"
        assert kernels["kept"] == f"mxfp8.{name} ({ops.kernel_name(name, torch.device('cuda'))})"
        assert re.fullmatch(r"triton_poi_fused_dequant_\d+ \+ extern_kernels\.mm", kernels["unmatched"])


def test_devices_are_not_mixed() -> None:
    weight, scale = all_codes()
    with pytest.raises(ValueError, match="weight is on cuda:0, scale on cpu"):
        mxfp8_ops.dequant(weight.cuda(), scale)
    with pytest.raises(ValueError, match="x is on cpu, weight on cuda:0"):
        mxfp8_ops.linear(torch.ones(1, 256), weight.cuda(), scale.cuda())
