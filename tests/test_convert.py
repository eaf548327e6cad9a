"""Whole models: which layers are swapped, why others stay, what stays shared, and how much memory it takes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs, expected_from_float64
from torch import Tensor, nn
from torch.nn.utils import prune

import mxfp8_ops
from mxfp8_ops import LayerSummary, Mxfp8Linear, convert, dequantize_at_load_, quantize_

FIRST, SECOND = "MXFP8_DEQUANT_AT_LOAD", "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD"


class Subclass(nn.Linear):
    pass


def hooked(register: Callable[[nn.Linear], object]) -> nn.Linear:
    linear = nn.Linear(64, 32)
    register(linear)
    return linear


def reasons(model: nn.Module) -> dict[str, str]:
    """Quantizes; name to reason of the layers that were left."""
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    summary = {entry.name: entry for entry in quantize_(model)}
    after = dict(model.named_modules())
    for name, entry in summary.items():
        assert entry.action == ("left" if entry.reason else "quantized")
        assert (after[name] is before[name]) == (entry.action == "left")
    return {name: entry.reason for name, entry in summary.items() if entry.action == "left"}


# --- quantize_ -----------------------------------------------------------------------------------------


def test_every_linear_is_swapped_for_its_packed_twin() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 96, bias=False)))
    dense = {"0": model[0].weight.detach().clone(), "2.0": model[2][0].weight.detach().clone()}
    bias = model[0].bias
    summary = quantize_(model)
    assert summary == [
        LayerSummary("0", (32, 64), "quantized", "", 32 * 64 * 4, 32 * 64 + 32 * 2),
        LayerSummary("2.0", (96, 32), "quantized", "", 96 * 32 * 4, 96 * 32 + 96),
    ]
    for name, weight in dense.items():
        module = model.get_submodule(name)
        assert type(module) is Mxfp8Linear
        for actual, expected in zip((module.weight, module.weight_scale), mxfp8_ops.quantize(weight), strict=True):
            assert_same(actual, expected)
    assert model[0].bias is bias
    assert type(model[1]) is nn.ReLU


def test_the_rule_reaches_the_weights() -> None:
    model = nn.Sequential(nn.Linear(32, 2))
    nn.init.constant_(model[0].weight, 500.0)
    quantize_(model, rule="floor")
    assert model[0].weight_scale.unique().tolist() == [127]
    with pytest.raises(ValueError, match="unknown quantization rule 'nearest'"):
        quantize_(nn.Sequential(nn.Linear(33, 2)), rule="nearest")


def test_the_filter_chooses_by_module_and_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8), "c": nn.Linear(32, 8), "d": nn.ReLU()})
    seen = []

    def chosen(module: nn.Module, name: str) -> bool:
        seen.append((name, module is model[name]))
        return name != "b" and module.in_features == 64

    assert [(entry.name, entry.action) for entry in quantize_(model, chosen)] == [("a", "quantized")]
    assert seen == [("a", True), ("b", True), ("c", True)]
    assert [type(module).__name__ for module in model.values()] == ["Mxfp8Linear", "Linear", "Linear", "ReLU"]


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (lambda: nn.Linear(33, 8), "in_features 33 is not a multiple of 32"),
        (lambda: nn.Linear(0, 8), "in_features 0 is not a multiple of 32"),
        (lambda: nn.Linear(64, 0), "out_features is 0"),
        (
            lambda: nn.Linear(64, 8, dtype=torch.float64),
            "weight dtype torch.float64 is not float32, bfloat16 or float16",
        ),
        (lambda: Subclass(64, 8), "Subclass is a subclass of nn.Linear"),
        (lambda: nn.LazyLinear(8), "LazyLinear is a subclass of nn.Linear"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)),
            "ParametrizedLinear is a subclass of nn.Linear",
        ),
        (lambda: hooked(lambda m: m.register_forward_hook(print)), "it has hooks, which a new module would lose"),
        (lambda: hooked(lambda m: m.register_forward_pre_hook(print)), "it has hooks"),
        (lambda: hooked(lambda m: m.register_full_backward_hook(print)), "it has hooks"),
        (lambda: hooked(lambda m: m.register_full_backward_pre_hook(print)), "it has hooks"),
        (lambda: hooked(lambda m: setattr(m, "forward", print)), "it has hooks"),
        (lambda: prune.l1_unstructured(nn.Linear(64, 8), "weight", 0.5), "it has hooks"),
        (lambda: nn.utils.weight_norm(nn.Linear(64, 8)), "it has hooks"),
        (lambda: nn.utils.spectral_norm(nn.Linear(64, 8)), "it has hooks"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, of deprecated and empty layers
def test_a_layer_that_cannot_be_packed_stays_with_its_reason(linear: Callable[[], nn.Linear], reason: str) -> None:
    left = reasons(nn.Sequential(linear(), nn.Linear(64, 8)))
    assert list(left) == ["0"]
    assert left["0"].startswith(reason)


@pytest.mark.parametrize("make", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_fused_attention_keeps_the_linears_it_reads(make: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"block": make(64, 4, 64, batch_first=True), "head": nn.Linear(64, 8)})
    left = reasons(model)
    assert left["block.linear1"] == left["block.linear2"] == "block reads its weight directly"
    assert left["block.self_attn.out_proj"] == "block.self_attn reads its weight directly"
    assert "head" not in left


def test_a_model_with_fused_attention_still_runs() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), nn.Linear(64, 8)).eval()
    quantize_(model)
    with torch.inference_mode():
        assert model(torch.ones(1, 3, 64)).isfinite().all()


def test_a_weight_tied_to_an_embedding_stays() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(128, 64), "up": nn.Linear(64, 64), "head": nn.Linear(64, 128)})
    model["head"].weight = model["embed"].weight
    assert reasons(model) == {"head": "its weight is shared with embed, which is not quantized"}
    assert model["head"].weight is model["embed"].weight


def test_a_weight_tied_to_a_layer_that_stays_stays() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": Subclass(64, 8), "c": nn.Linear(64, 8)})
    model["a"].weight = model["b"].weight = model["c"].weight
    left = reasons(model)
    assert left["b"] == "Subclass is a subclass of nn.Linear"
    assert left["a"].startswith("its weight is shared with ")
    assert left["c"].startswith("its weight is shared with ")
    assert model["a"].weight is model["b"].weight is model["c"].weight


def test_a_weight_tied_to_a_layer_that_was_not_selected_stays() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8)})
    model["a"].weight = model["b"].weight
    (entry,) = quantize_(model, lambda module, name: name == "a")
    assert (entry.action, entry.reason) == ("left", "its weight is shared with b, which is not quantized")


def test_tied_linears_share_one_packed_weight() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8)})
    model["a"].weight = model["b"].weight
    biases = model["a"].bias, model["b"].bias
    assert reasons(model) == {}
    assert model["a"] is not model["b"]
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight_scale is model["b"].weight_scale
    assert (model["a"].bias, model["b"].bias) == biases


def test_a_module_used_twice_is_swapped_in_both_places() -> None:
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, nn.ReLU(), nn.Sequential(linear))
    (entry,) = quantize_(model)
    assert entry.name == "0"
    assert type(model[0]) is Mxfp8Linear
    assert model[0] is model[2][0]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_each_layer_survives_both_ways(training: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64).train(training), nn.Linear(64, 64).train(not training))
    quantize_(model)
    assert [layer.training for layer in model] == [training, not training]
    dequantize_at_load_(model, True)
    assert [layer.training for layer in model] == [training, not training]


def test_a_meta_model_is_converted_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**20, 2**20), nn.Linear(64, 8, dtype=torch.float16))
    assert reasons(model) == {}
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model[0].weight.dtype == torch.float8_e4m3fn
    del model[0]
    dequantize_at_load_(model, True)
    assert model[0].weight.device.type == "meta"
    assert model[0].weight.dtype == torch.bfloat16


def test_a_bare_layer_cannot_be_swapped_in_place() -> None:
    with pytest.raises(TypeError, match=r"use Mxfp8Linear\.from_linear\(model\)"):
        quantize_(nn.Linear(64, 8))
    with pytest.raises(TypeError, match="put it into a container"):
        dequantize_at_load_(Mxfp8Linear(64, 8))


def test_converting_twice_changes_nothing_more() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    quantize_(model)
    packed = model[0]
    assert quantize_(model) == []
    assert model[0] is packed
    assert len(dequantize_at_load_(model, True)) == 1
    dense = model[0]
    assert dequantize_at_load_(model, True) == []
    assert model[0] is dense


# --- dequantize_at_load_ -------------------------------------------------------------------------------


def packed_model() -> nn.Sequential:
    weight, scale = all_codes()
    return nn.Sequential(Mxfp8Linear.from_quantized(weight, scale, torch.arange(256.0)), nn.ReLU())


@pytest.mark.parametrize(
    ("environment", "keyword", "dequantized"),
    [
        ({}, None, True),
        ({}, True, True),
        ({}, False, False),
        ({FIRST: "on"}, None, True),
        ({FIRST: "off"}, None, False),
        ({SECOND: "off"}, None, False),
        ({FIRST: "on", SECOND: "off"}, None, True),
        ({FIRST: "off"}, True, True),
        ({FIRST: "on"}, False, False),
    ],
)
def test_the_flag_decides(
    environment: dict[str, str], keyword: bool | None, dequantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, word in environment.items():
        monkeypatch.setenv(name, word)
    model = packed_model()
    packed = model[0]
    summary = dequantize_at_load_(model, keyword)
    if dequantized:
        assert summary == [LayerSummary("0", (256, 256), "dequantized", "", 256 * 256 + 256 * 8, 256 * 256 * 2)]
        assert type(model[0]) is nn.Linear
    else:
        assert summary == []
        assert model[0] is packed


def test_a_bad_flag_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model()
    monkeypatch.setenv(SECOND, "sometimes")
    with pytest.raises(ValueError, match=f"{SECOND} must be .* got 'sometimes'"):
        dequantize_at_load_(model)
    with pytest.raises(TypeError, match="dequant_at_load must be True, False or None, got 'on'"):
        dequantize_at_load_(model, "on")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be float32, bfloat16 or float16, got torch\.float64"):
        dequantize_at_load_(model, True, torch.float64)
    assert type(model[0]) is Mxfp8Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_and_the_bias_arrive_in_the_dtype(dtype: torch.dtype) -> None:
    model = packed_model()
    dequantize_at_load_(model, True, dtype)
    assert_same(model[0].weight, expected_from_float64(*all_codes(), dtype))
    assert_same(model[0].bias, torch.arange(256.0).to(dtype))
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert (model[0].in_features, model[0].out_features) == (256, 256)


def test_bfloat16_is_the_default_and_answers_stay_the_same() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.bfloat16)
    model = nn.Sequential(Mxfp8Linear.from_quantized(weight, scale, bias))
    expected = model(x)
    dequantize_at_load_(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert_same(model(x), expected)


def test_shared_layers_and_weights_stay_shared() -> None:
    weight, scale = all_codes()
    one = Mxfp8Linear.from_quantized(weight, scale)
    two = Mxfp8Linear.from_quantized(one.weight, one.weight_scale)
    model = nn.ModuleList([one, two, one])
    assert [entry.name for entry in dequantize_at_load_(model, True)] == ["0", "1"]
    assert model[0] is model[2]
    assert model[0] is not model[1]
    assert model[0].weight is model[1].weight


def test_a_shared_bias_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].bias = model[1].bias
    quantize_(model)
    assert model[0].bias is model[1].bias
    dequantize_at_load_(model, True)
    assert model[0].bias is model[1].bias


def test_one_weight_under_two_scales_becomes_two() -> None:
    weight, scale = all_codes()
    one = Mxfp8Linear.from_quantized(weight, scale)
    two = Mxfp8Linear.from_quantized(one.weight, scale.flip(0))
    model = nn.Sequential(one, two)
    dequantize_at_load_(model, True)
    assert_same(model[0].weight, expected_from_float64(weight, scale, torch.bfloat16))
    assert_same(model[1].weight, expected_from_float64(weight, scale.flip(0), torch.bfloat16))


def test_peak_memory_is_the_dense_model_and_one_layer() -> None:
    # VmHWM and not getrusage, whose maximum a child inherits from a larger parent. A fixed threshold keeps
    # every freed layer out of malloc's pool, where it would count although nothing holds it.
    script = """
        import re, torch
        from torch import nn
        from mxfp8_ops import Mxfp8Linear, dequantize_at_load_

        def megabytes(line):
            return int(re.search(line + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

        torch.set_num_threads(1)
        side, layers = 6144, 5

        def packed(n):
            weight = torch.full((n, n), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
            return Mxfp8Linear.from_quantized(weight, torch.full((n, n // 32), 127, dtype=torch.uint8))

        dequantize_at_load_(nn.Sequential(packed(2048)), True)  # code and caches are in memory now
        start = megabytes("VmRSS")
        model = nn.Sequential(*(packed(side) for _ in range(layers)))
        one, dense, bytes_ = side * side * 33 / 32 / 2**20, layers * side * side * 2 / 2**20, megabytes("VmRSS") - start
        assert abs(bytes_ - layers * one) < one / 2, bytes_
        dequantize_at_load_(model, True)
        assert all(layer.weight.dtype == torch.bfloat16 for layer in model)
        after, peak = megabytes("VmRSS") - start, megabytes("VmHWM") - start
        assert abs(after - dense) < one / 2, after
        slack = 24  # float32 chunks of 4 MB, a few at a time
        assert peak < dense + one + slack, (peak, dense, one)
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = ["env", "MALLOC_MMAP_THRESHOLD_=1048576", sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- dequant_bounded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 96, 100, 300, 1 << 20])
@pytest.mark.parametrize("shape", [(256,), (5, 96), (3, 4, 64), (2, 3, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounded_dequant_is_dequant(
    shape: tuple[int, ...], chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    scale = torch.randint(256, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, generator=generator)
    expected = mxfp8_ops.dequant(weight, scale, dtype)
    assert_same(convert.dequant_bounded(weight, scale, dtype), expected)
    out = torch.zeros(shape, dtype=dtype)
    assert convert.dequant_bounded(weight, scale, dtype, out) is out
    assert_same(out, expected)


def test_bounded_dequant_never_makes_more_than_a_chunk_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        sizes.append(weight.numel())
        return mxfp8_ops.dequant(weight, scale, dtype)

    monkeypatch.setattr(convert.functional, "dequant", counted)
    monkeypatch.setattr(convert, "_CHUNK_ELEMENTS", 192)
    for shape in ((7, 96), (2, 5, 96), (4, 2, 32)):
        weight = torch.ones(shape).to(torch.float8_e4m3fn)
        convert.dequant_bounded(weight, torch.ones(*shape[:-1], shape[-1] // 32, dtype=torch.uint8), torch.bfloat16)
        assert sum(sizes) == weight.numel()
        assert max(sizes) <= 192
        sizes.clear()
