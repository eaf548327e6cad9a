"""The check at every call: all weights at once, and none of them stale."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from helpers import assert_same
from models import folding, layer, rows
from torch import nn

import lowering
from lowering import slots, store

ON = {"dequant_at_load": True}


def model_of(*seeds: int) -> nn.Sequential:
    return nn.Sequential(*(layer(64, 64, seed=seed, bias=False) for seed in seeds))


def test_a_call_with_nothing_changed_looks_at_no_weight_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(3, 4, 5)
    compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
    with torch.no_grad():
        compiled(rows())
        compiled(rows())

        def one_by_one(*_: object) -> None:
            raise AssertionError("a weight was looked at by itself")

        monkeypatch.setattr(store.Entry, "is_current", one_by_one)
        monkeypatch.setattr(slots.Slot, "fetch", one_by_one)
        assert_same(compiled(rows()), model(rows()))
        model[1].weight_scale.add_(1)
        with pytest.raises(AssertionError, match="by itself"):
            compiled(rows())


def test_a_weight_in_the_place_of_one_that_is_gone_is_not_taken_for_it() -> None:
    model, x = model_of(3), rows()
    with torch.no_grad():
        compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
        for seed in range(12):  # places in memory are soon used again
            model[0].weight = nn.Parameter(layer(64, 64, seed=seed).weight, requires_grad=False)
            gc.collect()
            assert_same(compiled(x), model(x))


def test_an_alias_with_a_version_of_its_own_is_not_taken_for_what_it_was() -> None:
    model, x = model_of(3), rows()
    with torch.no_grad():
        compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
        compiled(x)
        first = model[0].weight
        first.view(torch.uint8).bitwise_xor_(0x80)
        model[0].weight = nn.Parameter(first.data, requires_grad=False)  # the same memory, version 0
        assert_same(compiled(x), model(x))


def test_graphs_that_share_a_value_each_see_its_change() -> None:
    model, x = model_of(3), rows()
    with torch.no_grad():
        one = torch.compile(model, backend=folding(**ON), fullgraph=True)
        other = torch.compile(lambda x: model(x) * 1, backend=folding(**ON), fullgraph=True)
        one(x), other(x)
        for _ in range(3):
            model[0].weight_scale.add_(1)
            assert_same(one(x), model(x))
            assert_same(other(x), model(x))


def test_a_release_by_one_graph_leaves_the_other_working() -> None:
    model, x = model_of(3), rows()
    with torch.no_grad():
        expected = model(x)
        one = torch.compile(model, backend=folding(**ON), fullgraph=True)
        assert_same(one(x), expected)
        other = torch.compile(lambda x: model(x) * 1, backend=folding(**ON, release_quantized=True), fullgraph=True)
        assert_same(other(x), expected)
        for _ in range(2):
            assert_same(one(x), expected)
        with pytest.raises(ValueError, match="was released"):
            model[0].weight_scale.add_(1)


def test_threads_that_call_while_another_changes_a_weight_see_one_of_its_states() -> None:
    model, x = model_of(3), rows()
    states = []
    with torch.no_grad():
        compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
        for _ in range(2):
            model[0].weight_scale.bitwise_xor_(1)
            states.append(model(x))
    assert not torch.equal(*states)
    compiled(x)
    wrong: list[torch.Tensor] = []
    stop = threading.Event()

    def call() -> None:
        with torch.no_grad():
            while not stop.is_set():
                compiled(x)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(100):
        with torch.no_grad():
            model[0].weight_scale.bitwise_xor_(1)
            result = compiled(x)  # the thread that changed it sees the change, whoever made the value
            if not torch.equal(result, states[i % 2]):
                wrong.append(result)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_refresh_reaches_calls_that_were_checked_already() -> None:
    model, x = model_of(3), rows()
    with torch.no_grad():
        compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
        compiled(x)
        model[0].weight.data.view(torch.uint8).copy_(layer(64, 64, seed=9).weight.view(torch.uint8))
        lowering.refresh(model)
        assert_same(compiled(x), model(x))
