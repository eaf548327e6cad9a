"""Whole models of packed layers: memory, shared weights, dequantizing them, compiling them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs
from models import Chain, layer, rows
from test_nn import CONVERSIONS, every_code, small
from test_nn_packed import assert_every_code_packed, assert_state, is_packed, other_codes, storages
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lowering
import mxfp8_ops
from lowering import report
from mxfp8_ops import Mxfp8Linear, dequantize_at_load_, functional, pack_
from mxfp8_ops.emulation import EmulationMxfp8LinearKernel, Mxfp8LinearLayerConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- memory --------------------------------------------------------------------------------------------


def test_the_bytes_of_the_other_form_are_freed() -> None:
    module = every_code()
    before = storages(module)
    module.pack_()
    assert all(storage.expired() for storage in before)
    packed = StorageWeakRef(module.weight_packed.untyped_storage())
    module.unpack_()
    assert packed.expired()


def test_each_layer_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer(seed=1), nn.Sequential(layer(seed=2), layer(seed=3)), layer(seed=4))
    alive = {module: storages(module) for module in model.modules() if isinstance(module, Mxfp8Linear)}
    pack, counts = functional.pack, []

    def counting(*args: Any) -> Tensor:
        counts.append(sum(not storage.expired() for pair in alive.values() for storage in pair))
        return pack(*args)

    monkeypatch.setattr(functional, "pack", counting)
    assert pack_(model) == 4
    assert counts == [8, 6, 4, 2]
    assert all(storage.expired() for pair in alive.values() for storage in pair)


def test_peak_memory_is_the_packed_model_and_one_layer() -> None:
    script = """
        import re, torch
        from torch import nn
        from mxfp8_ops import Mxfp8Linear, pack_

        def megabytes(line):
            return int(re.search(line + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

        torch.set_num_threads(1)
        side, layers = 10240, 3

        def made(n):
            weight = torch.full((n, n), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
            return Mxfp8Linear.from_quantized(weight, torch.full((n, n // 32), 127, dtype=torch.uint8))

        pack_(made(2048))  # code and caches are in memory now
        start = megabytes("VmRSS")
        model = nn.Sequential(*(made(side) for _ in range(layers)))
        one = side * side * 33 / 32 / 2**20
        before = megabytes("VmRSS") - start
        assert abs(before - layers * one) < one / 4, before
        assert pack_(model) == layers
        after, peak = megabytes("VmRSS") - start, megabytes("VmHWM") - start
        assert abs(after - layers * one) < one / 4, after
        slack = 64  # chunks of 16 MB, a few at a time
        assert peak < (layers + 1) * one + slack, (peak, one)
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = ["env", "MALLOC_MMAP_THRESHOLD_=1048576", sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- whole models --------------------------------------------------------------------------------------


def test_every_layer_of_a_model_is_packed_once_and_counted() -> None:
    inner = layer(64, 64, seed=2)
    model = nn.ModuleDict({"a": nn.Sequential(layer(64, 64, seed=1), inner, nn.Linear(64, 64)), "b": inner})
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert pack_(model) == 2
    assert [is_packed(module) for module in (*model["a"], model["b"])] == [True, True, False, True]
    assert model["b"] is inner
    assert_state(model, expected)
    assert pack_(model) == 0
    assert pack_(nn.Linear(64, 64)) == 0
    inner.unpack_()
    assert pack_(inner) == 1
    assert is_packed(inner)


def tied(scale: Callable[[Tensor], Tensor] = lambda scale: scale) -> nn.Sequential:
    weight, scales = all_codes()
    first = Mxfp8Linear.from_quantized(nn.Parameter(weight, requires_grad=False), scales)
    return nn.Sequential(first, Mxfp8Linear.from_quantized(first.weight, scale(scales)))


@pytest.mark.parametrize("scale", [lambda s: s, torch.clone], ids=["one scale", "equal scales"])
def test_a_shared_weight_stays_shared(scale: Callable[[Tensor], Tensor]) -> None:
    model = tied(scale)
    before = storages(model[0]) + storages(model[1])
    assert pack_(model) == 2
    assert model[0].weight_packed is model[1].weight_packed
    assert all(storage.expired() for storage in before)
    for name in ("half", "cpu", "deepcopy", "pickle", "torch.save"):
        converted = CONVERSIONS[name][0](model)
        assert converted[0].weight_packed is converted[1].weight_packed, name  # type: ignore[index]
        assert_every_code_packed(converted[1])  # type: ignore[index]
    model.load_state_dict({f"{i}.{name}": t for i in (0, 1) for name, t in other_codes().items() if name != "bias"})
    assert model[0].weight_packed is model[1].weight_packed
    assert_same(model[1].weight, other_codes()["weight"])


def test_a_weight_that_was_moved_stays_shared() -> None:
    model = tied().half()
    assert model[0].weight is model[1].weight
    assert model[0].weight_scale is not model[1].weight_scale
    pack_(model)
    assert model[0].weight_packed is model[1].weight_packed


def test_one_weight_under_two_scales_becomes_two() -> None:
    model = tied(lambda scale: scale.flip(0))
    assert pack_(model) == 2
    assert model[0].weight_packed is not model[1].weight_packed
    weight, scale = all_codes()
    for module, scales in zip(model, (scale, scale.flip(0)), strict=True):
        assert_same(module.weight, weight)
        assert_same(module.weight_scale, scales)


def test_a_layer_packed_alone_leaves_those_it_shares_a_weight_with() -> None:
    model = tied()
    weight = model[1].weight
    model[0].pack_()
    assert model[1].weight is weight
    assert_every_code_packed(model[0])
    assert_same(model[1].weight, all_codes()[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_is_dequantized_as_the_canonical_one(dtype: torch.dtype) -> None:
    models = tied(), tied()
    pack_(models[1])
    bytes_ = models[1][0].weight_packed.nbytes
    summaries = [dequantize_at_load_(model, True, dtype) for model in models]
    for canonical, packed in zip(*models, strict=True):
        assert type(packed) is nn.Linear
        assert_same(packed.weight, canonical.weight)
    assert models[1][0].weight is models[1][1].weight
    assert [(e.name, e.shape, e.bytes_after) for e in summaries[1]] == [
        (e.name, e.shape, e.bytes_after) for e in summaries[0]
    ]
    assert [e.bytes_before for e in summaries[1]] == [bytes_, bytes_]


def test_dequantizing_a_packed_model_unpacks_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(layer(64, 64, seed=seed) for seed in range(3)))
    pack_(model)
    packed = [StorageWeakRef(module.weight_packed.untyped_storage()) for module in model]
    unpack, alive = functional.unpack, []

    def counting(*args: Any) -> tuple[Tensor, Tensor]:
        alive.append([not storage.expired() for storage in packed])
        return unpack(*args)

    monkeypatch.setattr(functional, "unpack", counting)
    dequantize_at_load_(model, True)
    assert alive == [[True, True, True], [False, True, True], [False, False, True]]


def test_the_emulation_kernel_says_to_unpack_first() -> None:
    module = small(bias=False).pack_()
    kernel = EmulationMxfp8LinearKernel(Mxfp8LinearLayerConfig((7, 96)), dequant_at_load=False)
    x = exact_linear_inputs(3, 7, 96, torch.float32)[0]
    with pytest.raises(AttributeError, match=r"weight of a packed Mxfp8Linear cannot be replaced: call unpack_\(\)"):
        kernel.process_weights_after_loading(module)
    assert_same(kernel.apply_weights(module, x), module(x))
    kernel.process_weights_after_loading(module.unpack_())
    assert "weight_scale" in module._parameters  # where the kernel class keeps it
    assert_state(module.pack_(), small(bias=False).state_dict())
    assert_same(module(x), small(bias=False)(x))


# --- torch.compile -------------------------------------------------------------------------------------


def called(graphs: list[fx.GraphModule]) -> Counter[str]:
    return Counter(str(node.target) for graph in graphs for node in graph.graph.nodes if "mxfp8" in str(node.target))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "mxfp8"])
def test_a_compiled_packed_model_answers_as_the_canonical_one(backend: str) -> None:
    model = Chain()
    expected = {m: model(rows(m)) for m in (5, 2)}
    pack_(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for m in (5, 2):
        assert_same(compiled(rows(m)), expected[m])


@pytest.mark.parametrize("flag", [True, False])
def test_a_packed_weight_is_not_folded_under_either_flag(flag: bool) -> None:
    model = Chain()
    expected = model(rows())
    pack_(model)
    options = {"dequant_at_load": flag}
    with report.collect() as graphs:
        assert_same(torch.compile(model, backend="mxfp8", options=options, fullgraph=True)(rows()), expected)
    assert [(weight.name, weight.action) for weight in report.distinct(graphs)] == [
        ("up.weight_packed", "kept"),
        ("down.weight_packed", "kept"),
    ]
    lowering.enable()
    assert_same(torch.compile(model, fullgraph=True)(rows()), expected)


def test_compiled_code_follows_a_layer_that_is_packed_unpacked_and_loaded() -> None:
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = layer()
    expected = model(rows())
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    assert_same(compiled(rows()), expected)
    model.pack_()
    assert_same(compiled(rows()), expected)
    assert called(graphs) == {"mxfp8.linear.default": 1, "mxfp8.linear_packed.default": 1}
    other = layer(seed=9)
    model.load_state_dict(other.state_dict())
    assert_same(compiled(rows()), other(rows()))
    assert len(graphs) == 2  # loading is in place
    model.unpack_()
    assert_same(compiled(rows()), other(rows()))


def test_training_a_packed_layer_compiles() -> None:
    x = exact_linear_inputs(3, 7, 96, torch.float32)[0].requires_grad_()
    canonical, packed = small(), small().pack_()
    compiled = torch.compile(packed, fullgraph=True)
    expected = torch.autograd.grad(canonical(x).square().sum(), (x, canonical.bias))
    for actual, gradient in zip(
        torch.autograd.grad(compiled(x).square().sum(), (x, packed.bias)), expected, strict=True
    ):
        assert_same(actual, gradient)


def test_reading_the_weight_compiles() -> None:
    module = small().pack_()
    x = exact_linear_inputs(3, 7, 96, torch.float32)[0]

    def function(x: Tensor) -> Tensor:
        return mxfp8_ops.linear(x.to(module.weight.device), module.weight, module.weight_scale, module.bias)

    assert_same(torch.compile(function, backend="aot_eager", fullgraph=True)(x), small()(x))


def test_export_holds_the_packed_weight() -> None:
    model = nn.Sequential(small().pack_())
    program = torch.export.export(model, (torch.ones(4, 96),))
    assert list(program.state_dict) == ["0.weight_packed", "0.bias"]
    x = exact_linear_inputs(4, 7, 96, torch.float32)[0]
    assert_same(program.module()(x), small()(x))
