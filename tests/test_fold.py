"""Folded and not folded give the same bits as the reference, for every code and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs, expected_from_float64
from models import folding, layer, rows
from torch import Tensor, nn

import lowering
import mxfp8_ops
from lowering import report
from mxfp8_ops import reference

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]

PATHS: dict[str, tuple[Compile, bool]] = {
    "plain": (lambda m: torch.compile(m, fullgraph=True), False),
    "backend, off": (lambda m: torch.compile(m, backend="mxfp8", fullgraph=True), False),
    "backend, on": (lambda m: torch.compile(m, backend="mxfp8", fullgraph=True, options=ON), False),
    "freezing, backend, on": (lambda m: torch.compile(m, backend="mxfp8", fullgraph=True, options=ON), True),
    "freezing, options, on": (lambda m: torch.compile(m, fullgraph=True, options=lowering.options(True)), True),
    "freezing, options, off": (lambda m: torch.compile(m, fullgraph=True, options=lowering.options(False)), True),
    "backend, packed": (lambda m: torch.compile(m, backend="mxfp8", fullgraph=True, options=PACKED), False),
    "freezing, packed": (lambda m: torch.compile(m, fullgraph=True, options=lowering.options(False, True)), True),
}
ON = {"dequant_at_load": True}
PACKED = {"dequant_at_load": False, "pack_at_load": True}


@pytest.fixture(params=PATHS)
def compiled(request: pytest.FixtureRequest) -> Iterator[Compile]:
    compile_model, freezing = PATHS[request.param]
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        yield compile_model


class Codes(nn.Module):
    """Every code as a weight, through dequant alone and through a linear with an identity x."""

    def __init__(self) -> None:
        super().__init__()
        weight, scale = all_codes()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, eye: Tensor) -> list[Tensor]:
        # The additions keep the results inside the graph; x + 0 would lose the sign of -0.
        dequantized = [
            mxfp8_ops.dequant(self.weight, self.scale, dtype).view(-1).unsqueeze(0) * 1
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ]
        return [*dequantized, mxfp8_ops.linear(eye, self.weight, self.scale)]


def test_every_code_is_exact_on_every_path(compiled: Compile) -> None:
    model, eye = Codes(), torch.eye(256)
    *dequantized, product = compiled(model)(eye)
    weight, scale = all_codes()
    for actual in dequantized:
        assert_same(actual.view(256, 256), expected_from_float64(weight, scale, actual.dtype))
    # A NaN or an infinity in a row reaches all of its products, so compare with the eager product.
    assert_same(product, reference.linear(eye, weight, scale))


SHAPES = [(m, n, k) for m in (0, 1, 3, 17) for n, k in ((1, 32), (7, 96), (64, 288))]


def test_linear_equals_the_reference_over_shapes_on_every_path(compiled: Compile) -> None:
    inputs = {shape: exact_linear_inputs(*shape, torch.bfloat16) for shape in SHAPES}
    layers = {shape: mxfp8_ops.Mxfp8Linear.from_quantized(*each[1:]) for shape, each in inputs.items()}
    model = compiled(lambda *xs: [layers[shape](x) for shape, x in zip(SHAPES, xs, strict=True)])
    results = model(*[x for x, *_ in inputs.values()])
    for actual, (x, weight, scale, bias) in zip(results, inputs.values(), strict=True):
        assert_same(actual, reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_equals_the_reference_in_other_dtypes_on_every_path(compiled: Compile, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, dtype)
    model = mxfp8_ops.Mxfp8Linear.from_quantized(weight, scale, bias)
    assert_same(compiled(model)(x), reference.linear(x, weight, scale, bias))


def test_expert_stacks_dequantize_alike_on_every_path(compiled: Compile) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight, scale = mxfp8_ops.quantize(torch.randn(4, 24, 64))
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.scale = nn.Parameter(scale, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.baddbmm(torch.zeros(4, 3, 24), x, mxfp8_ops.dequant(self.weight, self.scale, x.dtype).mT)

    model, x = Experts(), torch.zeros(4, 3, 64)
    x[:, range(3), [5, 17, 63]] = 2
    assert_same(compiled(model)(x), model(x))


def actions(model: nn.Module, *inputs: Tensor, **options: object) -> list[tuple[str, str]]:
    with report.collect() as graphs:
        torch.compile(model, backend=folding(**options), fullgraph=True)(*inputs)
    return [(weight.action, weight.reason) for weight in report.distinct(graphs)]


@pytest.mark.parametrize("flag", [None, "0", "off"])
def test_nothing_folds_unless_the_flag_is_on(flag: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if flag is not None:
        monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", flag)
    assert actions(layer(), rows()) == [("kept", "the flag is not on")]


@pytest.mark.parametrize("name", ["MXFP8_DEQUANT_AT_LOAD", "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD"])
def test_either_variable_folds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "on")
    assert actions(layer(), rows()) == [("folded", "dequantized to bfloat16")]


def test_keyword_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "1")
    assert actions(layer(), rows(), dequant_at_load=False) == [("kept", "the flag is not on")]


def test_bad_flag_value_names_the_variable_at_compile_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "maybe")
    with pytest.raises(Exception, match=r"MXFP8_DEQUANT_AT_LOAD must be .*'maybe'"):
        torch.compile(layer(), backend=folding(), fullgraph=True)(rows())


def test_backend_rejects_options_it_does_not_know() -> None:
    with pytest.raises(Exception, match="dequantize_at_load"):
        torch.compile(layer(), backend="mxfp8", options={"dequantize_at_load": True})(rows())
    with pytest.raises(Exception, match="dequant_at_load must be True, False or None, got 'yes'"):
        torch.compile(layer(), backend="mxfp8", options={"dequant_at_load": "yes"})(rows())


def test_weights_that_may_differ_at_every_call_are_kept() -> None:
    packed = layer()
    arguments = (rows(), packed.weight.detach(), packed.weight_scale)
    expected = ("kept", "an argument of the call, neither parameter nor buffer")
    assert actions(mxfp8_ops.linear, *arguments, dequant_at_load=True) == [expected]


def test_weights_that_close_over_a_function_are_folded() -> None:
    packed = layer()
    weight, scale = packed.weight.detach(), packed.weight_scale.view(torch.float8_e8m0fnu)
    assert actions(lambda x: mxfp8_ops.linear(x, weight, scale), rows(), dequant_at_load=True)[0][0] == "folded"


def test_one_expert_of_a_stack_is_folded_by_itself() -> None:
    weight, scale = (
        torch.stack(pair) for pair in zip(*[(e.weight, e.weight_scale) for e in map(seeded, range(3))], strict=True)
    )

    def model(x: Tensor) -> Tensor:
        return mxfp8_ops.linear(x, weight[1], scale[1]) + mxfp8_ops.linear(x, weight[2], scale[2])

    compiled = torch.compile(model, backend=folding(dequant_at_load=True), fullgraph=True)
    with report.collect() as graphs:
        assert_same(compiled(rows()), model(rows()))
    (graph,) = graphs
    assert [each.shape for each in graph.weights] == [(48, 64), (48, 64)]
    assert len({each.name for each in graph.weights}) == 2


def seeded(seed: int) -> mxfp8_ops.Mxfp8Linear:
    return layer(seed=seed, bias=False)


def test_weight_the_graph_writes_to_is_kept() -> None:
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer()

        def forward(self, x: Tensor) -> Tensor:
            self.inner.weight_scale.sub_(1)
            return self.inner(x)

    expected = ("kept", "the graph writes to the weight or its scale")
    assert actions(Decaying(), rows(), dequant_at_load=True) == [expected]
    ours, theirs = Decaying(), Decaying()
    compiled = torch.compile(ours, backend="mxfp8", options=ON, fullgraph=True)
    for _ in range(3):
        assert_same(compiled(rows()), theirs(rows()))


def test_dequantized_tensor_that_leaves_the_graph_is_never_the_shared_one() -> None:
    packed = layer()

    def model() -> Tensor:
        return mxfp8_ops.dequant(packed.weight, packed.weight_scale)

    compiled = torch.compile(model, backend="mxfp8", options=ON, fullgraph=True)
    first = compiled()
    first.zero_()
    assert_same(compiled(), model())


def test_dequantized_tensor_that_is_written_to_is_never_the_shared_one() -> None:
    packed = layer()

    def model(x: Tensor) -> Tensor:
        weight = mxfp8_ops.dequant(packed.weight, packed.weight_scale)
        weight.view(-1)[:7].mul_(2)
        return x @ weight.t()

    compiled = torch.compile(model, backend="mxfp8", options=ON, fullgraph=True)
    for _ in range(2):
        assert_same(compiled(rows()), model(rows()))


def test_weight_made_in_inference_mode_is_kept() -> None:
    with torch.inference_mode():
        packed = layer()
    with torch.no_grad():
        (found,) = actions(packed, rows(), dequant_at_load=True)
    assert found == ("kept", "made in inference mode: without a version counter a change could not be seen")


@pytest.mark.parametrize("flag", [True, False])
def test_weight_that_requires_a_gradient_is_the_error_of_eager(flag: bool) -> None:
    packed = layer()
    packed.weight.requires_grad_(True)
    for model in (packed, torch.compile(packed, backend="mxfp8", options={"dequant_at_load": flag}, fullgraph=True)):
        with pytest.raises(Exception, match="an MXFP8 weight is frozen and cannot have a gradient"):
            model(rows())


def test_not_folded_dequant_is_one_loop_without_a_float32_tensor() -> None:
    packed = layer(64, 64)

    def model(x: Tensor) -> Tensor:
        return x @ mxfp8_ops.dequant(packed.weight, packed.weight_scale).t()

    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = torch._inductor.utils.run_and_get_code(
            torch.compile(model, backend="mxfp8", fullgraph=True), rows()
        )
    assert code.count("async_compile.cpp_pybinding") == 1
    assert "torch.float32" not in code
    assert "torch.ops.mxfp8" not in code


@pytest.mark.parametrize(("options", "kernel"), [(ON, "linear"), (PACKED, "mxfp8.linear_packed (reference)")])
def test_a_frozen_graph_from_the_cache_is_reported_with_its_kernel(
    options: dict[str, bool], kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    packed = layer(bias=False)
    for _ in range(2):
        torch._dynamo.reset()
        with report.collect() as graphs, torch.no_grad(), torch._inductor.config.patch(freezing=True):
            actual = torch.compile(packed, backend="mxfp8", fullgraph=True, options=options)(rows())
        assert_same(actual, packed(rows()))
    (row,) = graphs[0].weights
    assert graphs[0].from_cache
    assert row.kernel == kernel
