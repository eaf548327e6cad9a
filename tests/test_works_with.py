"""The lowering beside the rest of torch.compile: shapes, training, autocast, modes, regions, threads."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from helpers import assert_same
from models import Chain, entries_of, folding, layer, rows
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import lowering
from lowering import report
from mxfp8_ops import Mxfp8Linear

ON, OFF = {"dequant_at_load": True}, {"dequant_at_load": False}
both_flags = pytest.mark.parametrize("options", [ON, OFF], ids=["on", "off"])


def distinct_actions(graphs: list[report.GraphReport]) -> set[str]:
    return {weight.action for weight in report.distinct(graphs)}


@both_flags
def test_dynamic_batch_compiles_once_for_all_sizes(options: dict[str, bool]) -> None:
    model = Chain()
    with report.collect() as graphs:
        compiled = torch.compile(model, backend="mxfp8", options=options, fullgraph=True, dynamic=True)
        for m in (2, 3, 17, 40):
            assert_same(compiled(rows(m)), model(rows(m)))
    assert len(graphs) == 1


@both_flags
def test_automatic_dynamic_batch_compiles_twice_at_most(options: dict[str, bool]) -> None:
    model = Chain()
    with report.collect() as graphs:
        compiled = torch.compile(model, backend="mxfp8", options=options, fullgraph=True)
        for m in (2, 3, 17, 40):
            assert_same(compiled(rows(m)), model(rows(m)))
    assert len(graphs) == 2


def test_graphs_that_share_a_weight_share_its_dequantized_value() -> None:
    model = layer()
    first = torch.compile(lambda x: model(x) + 1, backend=folding(**ON), fullgraph=True)
    second = torch.compile(lambda x: model(x) * 2, backend=folding(**ON), fullgraph=True)
    assert_same(first(rows()), model(rows()) + 1)
    (entry,) = entries_of(model)
    address = entry.value.data_ptr()
    assert_same(second(rows()), model(rows()) * 2)
    second(rows(9))  # a recompile
    assert [each.value.data_ptr() for each in entries_of(model)] == [address]
    model.weight_scale.add_(1)
    assert_same(first(rows()), model(rows()) + 1)
    assert entry.value.data_ptr() == address  # refreshed in place


def test_identical_layers_share_one_graph_and_keep_their_own_weights() -> None:
    blocks = nn.ModuleList([layer(64, 64, seed=seed) for seed in range(4)])
    one_backend = folding(**ON)
    with report.collect() as graphs:
        for block in blocks:
            block.compile(backend=one_backend, fullgraph=True)
        results = [[block(rows()) for block in blocks] for _ in range(3)]
    for each in results:
        for block, actual in zip(blocks, each, strict=True):
            assert_same(actual, Mxfp8Linear.forward(block, rows()))
    assert len(graphs) == 1
    assert len(entries_of(blocks)) == 4
    made = [entry.value for entry in entries_of(blocks)]
    for block in blocks:
        block(rows())
    assert all(a is b.value for a, b in zip(made, entries_of(blocks), strict=True))  # nothing is made again


@both_flags
def test_regional_compilation_of_a_repeated_block(options: dict[str, bool]) -> None:
    model = nn.Sequential(Chain(), layer(64, 32, seed=8), Chain())
    expected = model(rows())
    for block in (model[0], model[2]):
        block.compile(backend="mxfp8", options=options, fullgraph=True)
    assert_same(model(rows()), expected)


class Region(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = layer(64, 64, seed=seed)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) > 3).to(x.dtype)


@both_flags
def test_nested_compile_regions(options: dict[str, bool]) -> None:
    model = nn.Sequential(*[Region(seed) for seed in range(4)])
    with report.collect() as graphs:
        compiled = torch.compile(model, backend="mxfp8", options=options, fullgraph=True)
        assert_same(compiled(rows()), model(rows()))
    assert distinct_actions(graphs) == {"folded" if options["dequant_at_load"] else "kept"}
    assert [weight.name for weight in sorted(graphs[0].weights, key=lambda w: w.name)] == [
        f"{i}.inner.weight" for i in range(4)
    ]


def gradients(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    wanted = [x, *[parameter for parameter in model.parameters() if parameter.requires_grad]]
    return list(torch.autograd.grad(run(x).square().sum(), wanted))


@both_flags
def test_training_gives_the_gradients_of_eager(options: dict[str, bool]) -> None:
    model = nn.Sequential(layer(64, 64, dtype=torch.float32), nn.ReLU(), layer(48, 64, seed=8, dtype=torch.float32))
    x = rows(3, dtype=torch.float32)
    compiled = torch.compile(model, backend="mxfp8", options=options, fullgraph=True)
    for actual, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
        assert_same(actual, expected)


@both_flags
def test_activation_checkpointing(options: dict[str, bool]) -> None:
    model = nn.Sequential(layer(64, 64, dtype=torch.float32), nn.ReLU(), layer(48, 64, seed=8, dtype=torch.float32))
    x = rows(3, dtype=torch.float32)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    with report.collect() as graphs:
        compiled = torch.compile(run, backend="mxfp8", options=options, fullgraph=True)
        for actual, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
            assert_same(actual, expected)
    assert distinct_actions(graphs) == {"folded" if options["dequant_at_load"] else "kept"}


@both_flags
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_outside_and_inside_of_the_compiled_region(options: dict[str, bool], dtype: torch.dtype) -> None:
    model, x = layer(dtype=torch.float32), rows(dtype=torch.float32)

    def inside(x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", dtype):
            within = model(x)
        return [within, model(x)]

    compiled = torch.compile(model, backend="mxfp8", options=options, fullgraph=True)
    with torch.autocast("cpu", dtype):
        assert_same(compiled(x), model(x))
        assert compiled(x).dtype == dtype
    assert_same(compiled(x), model(x))
    for actual, expected in zip(
        torch.compile(inside, backend="mxfp8", options=options, fullgraph=True)(x), inside(x), strict=True
    ):
        assert_same(actual, expected)


@both_flags
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_of_torch_compile(mode: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "1" if options["dequant_at_load"] else "0")
    model = Chain()
    with torch.no_grad(), report.collect() as graphs:
        compiled = torch.compile(model, backend="mxfp8", mode=mode, fullgraph=True)
        for _ in range(3):
            assert_same(compiled(rows()), model(rows()))
    assert distinct_actions(graphs) == {"folded" if options["dequant_at_load"] else "kept"}


@both_flags
def test_inference_mode_and_then_training_on_one_compiled_model(options: dict[str, bool]) -> None:
    model = layer(dtype=torch.float32)
    compiled = torch.compile(model, backend="mxfp8", options=options, fullgraph=True)
    x = rows(dtype=torch.float32)
    with torch.inference_mode():
        assert_same(compiled(x), model(x))
    for actual, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
        assert_same(actual, expected)
    with torch.inference_mode():
        model.weight_scale.add_(1)
        assert_same(compiled(x), model(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_folded_model_fold_their_own_weights(how: Any) -> None:
    model = Chain()
    compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
    compiled(rows())
    twin = how(model)
    twin.up.weight_scale.add_(1)
    compiled_twin = torch.compile(twin, backend=folding(**ON), fullgraph=True)
    assert_same(compiled_twin(rows()), twin(rows()))
    assert_same(compiled(rows()), model(rows()))
    assert all(name.startswith("_dynamo") for name in vars(model.up.weight))  # nothing of ours is carried along


def test_compiles_in_several_threads_at_once() -> None:
    models, results, errors = [Chain() for _ in range(4)], {}, []
    for seed, model in enumerate(models):
        model.up.weight_scale.add_(seed)
    barrier = threading.Barrier(len(models))

    def work(i: int) -> None:
        try:
            barrier.wait()
            compiled = torch.compile(models[i], backend=folding(**(ON if i % 2 else OFF)), fullgraph=True)
            results[i] = [compiled(rows(m)) for m in (3, 5, 3)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i, model in enumerate(models):
        for m, actual in zip((3, 5, 3), results[i], strict=True):
            assert_same(actual, model(rows(m)))


def test_calls_from_several_threads_while_the_scale_changes_see_the_new_value_afterwards() -> None:
    model, x = layer(), rows()
    compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
    compiled(x)
    model.weight_scale.add_(1)
    expected, results = model(x), []
    threads = [threading.Thread(target=lambda: results.append(compiled(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for actual in results:
        assert_same(actual, expected)


def test_dynamo_graph_itself_is_not_changed() -> None:
    seen: list[tuple[str, str]] = []

    def compare(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        before = str(gm.graph)
        compiled = folding(**ON)(gm, inputs)
        seen.append((before, str(gm.graph)))
        return compiled

    torch.compile(Chain(), backend=compare, fullgraph=True)(rows())
    assert seen[0][0] == seen[0][1]


def test_bias_in_two_layers_on_one_weight() -> None:
    first = layer()
    second = Mxfp8Linear.from_quantized(first.weight, first.weight_scale, first.bias.detach() + 1)
    second.weight = first.weight

    def model(x: Tensor) -> Tensor:
        return first(x) - second(x)

    compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
    with report.collect() as graphs:
        assert_same(compiled(rows()), model(rows()))
    assert len(graphs[0].weights) == 1
    lowering.refresh(nn.ModuleList([first, second]))
    assert_same(compiled(rows()), model(rows()))
