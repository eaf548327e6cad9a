"""Weights that are packed when a model is compiled: once, shared, never stale, freed on request."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same
from models import Chain, entries_of, folding, layer, rows
from torch import Tensor, nn

import lowering
import mxfp8_ops
from lowering import released, report, store
from lowering.forms import Packed
from mxfp8_ops import Mxfp8Linear, packing

PACK = {"dequant_at_load": False, "pack_at_load": True}
RELEASE = PACK | {"release_quantized": True}


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that are packed."""
    found: list[Tensor] = []
    pack = packing.pack

    def counted(weight: Tensor, scale: Tensor, *args: Any) -> Tensor:
        found.append(weight)
        return pack(weight, scale, *args)

    monkeypatch.setattr(packing, "pack", counted)
    yield found
    found.clear()


def packed_value(model: Mxfp8Linear) -> Tensor:
    tensors = model.weight, model.weight_scale
    value = store.entry(tensors, (lambda t: t, lambda t: t), "|", Packed(torch.bfloat16)).value
    assert value is not None
    return value


def reported(model: Any, x: Tensor, **options: Any) -> list[report.WeightReport]:
    with report.collect() as graphs, torch.no_grad():
        torch.compile(model, backend=folding(**options), fullgraph=True)(x)
    return graphs[0].weights


@pytest.mark.parametrize("flag", [None, False], ids=["unset", "off"])
def test_a_weight_that_is_not_folded_is_packed_where_asked(flag: bool | None) -> None:
    (row,) = reported(layer(), rows(), dequant_at_load=flag, pack_at_load=True)
    assert (row.action, row.reason) == (
        "kept",
        "packed, fast decoding for bfloat16 (on GPUs; here unpacked in every call); at load",
    )
    size = layer().weight.nbytes + layer().weight_scale.nbytes
    assert row.bytes_packed == packing.pack(layer().weight, layer().weight_scale).nbytes
    assert (row.bytes_before, row.bytes_after) == (size, size + row.bytes_packed)


@pytest.mark.parametrize(
    ("options", "action"),
    [({"pack_at_load": None}, "kept"), ({"pack_at_load": False}, "kept"), (PACK | {"dequant_at_load": True}, "folded")],
)
def test_no_weight_is_packed_unasked_on_the_cpu_nor_where_it_is_folded(options: dict[str, Any], action: str) -> None:
    (row,) = reported(layer(), rows(), **options)
    assert (row.action, row.bytes_packed) == (action, 0)


def test_codes_that_need_exact_decoding_are_told() -> None:
    model = layer()
    model.weight.view(torch.uint8)[3, 5] = 0x7F
    (row,) = reported(model, rows(), **PACK)
    assert row.decoding == {"bfloat16": "exact"}
    assert "exact decoding for bfloat16, which some codes need" in row.reason


def test_float32_and_dequantized_uses_keep_the_canonical_weight() -> None:
    (row,) = reported(layer(dtype=torch.float32), rows(dtype=torch.float32), **PACK)
    assert (row.action, row.reason, row.bytes_packed) == ("kept", "the flag is not on", 0)
    model = layer()
    (row,) = reported(lambda x: x @ mxfp8_ops.dequant(model.weight, model.weight_scale).T, rows(), **PACK)
    assert (row.action, row.bytes_packed) == ("unmatched", 0)


def test_a_weight_that_cannot_be_packed_says_why() -> None:
    weight, scale = layer().weight.detach().clone(), layer().weight_scale  # no Parameter
    with report.collect() as graphs:
        model = torch.compile(lambda x, weight: mxfp8_ops.linear(x, weight, scale), backend=folding(**PACK))
        model(rows(), weight)
    assert graphs[0].weights[0].reason == (
        "the flag is not on; not packed: an argument of the call, neither parameter nor buffer"
    )


def test_a_weight_is_packed_once_for_all_graphs_and_recompiles(packings: list[Tensor]) -> None:
    model = layer()
    compiled = [torch.compile(model, backend=folding(**PACK), fullgraph=True) for _ in range(2)]
    with report.collect() as graphs, torch.no_grad():
        for m in (2, 3, 5, 9):  # the second is compiled for every number of rows
            for each in compiled:
                assert_same(each(rows(m)), model(rows(m)))
    assert len(graphs) <= 4
    assert len(packings) == 1


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16])
def test_a_weight_is_packed_for_the_first_dtype_of_x_and_serves_the_other(
    first: torch.dtype, packings: list[Tensor]
) -> None:
    model = layer(bias=False)
    compiled = torch.compile(model, backend=folding(**PACK), fullgraph=True)
    with torch.no_grad(), report.collect() as graphs:
        for dtype in (first, torch.bfloat16, torch.float16):
            assert_same(compiled(rows(dtype=dtype)), model(rows(dtype=dtype)))
    assert len(graphs) == 2
    assert len(packings) == 1
    (entry,) = entries_of(model)
    assert packing.packed_for(entry.value) == first


def test_layers_that_share_a_graph_have_their_own_packed_weights(packings: list[Tensor]) -> None:
    layers = [layer(64, 64, seed=seed, bias=False) for seed in (3, 4, 5)]
    compiled = [torch.compile(each, backend=folding(**PACK), fullgraph=True) for each in layers]
    for _ in range(2):
        for each, one in zip(compiled, layers, strict=True):
            assert_same(each(rows()), one(rows()))
    assert len(packings) == 3


def test_a_changed_weight_is_packed_into_the_same_memory() -> None:
    model, x = layer(), rows()
    compiled = torch.compile(model, backend=folding(**PACK), fullgraph=True)
    compiled(x)
    address = packed_value(model).data_ptr()
    for change in (lambda: model.weight_scale.add_(1), lambda: model.weight.data.view(torch.uint8).bitwise_xor_(0x80)):
        change()
        lowering.refresh(model)
        assert_same(compiled(x), model(x))
        assert packed_value(model).data_ptr() == address


def test_the_packed_weight_goes_with_its_weight() -> None:
    model = layer()
    torch.compile(model, backend=folding(**PACK), fullgraph=True)(rows())
    value = weakref.ref(packed_value(model))
    del model
    gc.collect()
    assert value() is None


def test_release_frees_the_canonical_bytes_and_recompiles_go_on() -> None:
    model = Chain()
    expected = {m: model(rows(m)) for m in (1, 5, 9)}
    with report.collect() as graphs, torch.no_grad():
        compiled = torch.compile(model, backend="mxfp8", options=RELEASE, fullgraph=True)
        for m in (5, 9, 1, 5):
            assert_same(compiled(rows(m)), expected[m])
    for row, each in zip(graphs[0].weights, (model.up, model.down), strict=True):
        assert released.is_released(each.weight)
        assert row.bytes_after == row.bytes_packed
    with pytest.raises(ValueError, match="this MXFP8 weight was released"):
        model(rows())
    refusals = {
        "cannot be dequantized to bfloat16 again": {"dequant_at_load": True},
        "the flag is not on.*compile it as before, packed for bfloat16,": {"pack_at_load": False},
    }
    for message, options in refusals.items():
        with pytest.raises(Exception, match=message):
            torch.compile(model.up, backend=folding(**options))(rows(3))


def test_gradients_of_x_are_those_of_eager() -> None:
    model = layer()
    compiled = torch.compile(model, backend="mxfp8", options=PACK, fullgraph=True)
    gradients = []
    for run in (model, compiled):
        x = rows().requires_grad_()
        run(x).sum().backward()
        gradients.append(x.grad)
    assert_same(*gradients)


def test_autocast_packs_for_the_dtype_that_it_computes_in() -> None:
    model, x = layer(dtype=torch.float32), rows(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), report.collect() as graphs:
        assert_same(torch.compile(model, backend="mxfp8", options=PACK, fullgraph=True)(x), model(x))
    assert graphs[0].weights[0].decoding == {"bfloat16": "fast"}


def test_the_environment_decides_and_takes_effect_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer(), rows()
    compiled = torch.compile(model, backend=folding(), fullgraph=True)
    seen = []
    for word in ("on", "0", "yes"):
        monkeypatch.setenv("MXFP8_PACK_AT_LOAD", word)
        with report.collect() as graphs, torch.no_grad():
            assert_same(compiled(x), model(x))
        seen += [bool(graph.weights[0].bytes_packed) for graph in graphs]
    assert seen[:2] == [True, False]
    monkeypatch.setenv("MXFP8_PACK_AT_LOAD", "perhaps")
    with pytest.raises(Exception, match="MXFP8_PACK_AT_LOAD must be 1/true/yes/on or 0/false/no/off, got 'perhaps'"):
        compiled(x)


@pytest.mark.parametrize("name", ["pack_at_load", "merge_linears"])
def test_options_that_are_no_bool_are_an_error(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True, False or None, got 'on'"):
        lowering.Options(**{name: "on"})


def test_enable_and_explain_know_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer()
    lowering.enable(pack_at_load=True)
    with report.collect() as graphs, torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True)(rows()), model(rows()))
    lowering.disable()
    assert graphs[0].weights[0].bytes_packed
    monkeypatch.setenv("MXFP8_PACK_AT_LOAD", "1")
    found = json.loads(lowering.explain(nn.Sequential(model), rows()).to_json())
    ((row,),) = [run["weights"] for run in found["runs"]]
    assert row["bytes_packed"] == graphs[0].weights[0].bytes_packed
