"""What a watch sees, what it keeps alive, and how objects are told apart at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from helpers import assert_same
from models import folding, layer, rows
from torch import Tensor, nn

from lowering import store, watch
from lowering.watch import Watch

DTYPES = [torch.float8_e4m3fn, torch.uint8]


def tensors() -> list[Tensor]:
    """A weight and a scale, parameter and plain tensor, twice."""
    made = [torch.zeros(64, 32, dtype=torch.uint8).view(DTYPES[i % 2]) for i in range(4)]
    return [nn.Parameter(each, requires_grad=False) if i % 2 == 0 else each for i, each in enumerate(made)]


def write_through_a_view(tensor: Tensor) -> None:
    tensor.view(torch.uint8)[3].fill_(1)


def write_through_a_detached_alias(tensor: Tensor) -> None:
    tensor.detach().zero_()


def write_in_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.zero_()


def write_as_an_operator_s_result(tensor: Tensor) -> None:
    torch.bitwise_not(torch.ones(64, 32, dtype=torch.uint8), out=tensor.detach().view(torch.uint8))


def take_other_data(tensor: Tensor) -> None:
    tensor.data = tensor.detach().clone()


def take_data_of_the_same_memory(tensor: Tensor) -> None:
    tensor.data = tensor.detach()[1:]


CHANGES = [
    Tensor.zero_,
    write_through_a_view,
    write_through_a_detached_alias,
    write_in_inference_mode,
    write_as_an_operator_s_result,
    take_other_data,
    take_data_of_the_same_memory,
]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_sees(change: Callable[[Tensor], object], which: int) -> None:
    watched = tensors()
    watching = Watch(watched)
    assert watching.sees_no_change(watched)
    change(watched[which])
    assert not watching.sees_no_change(watched)
    assert Watch(watched).sees_no_change(watched)


def read_all(watched: list[Tensor]) -> None:
    for each in watched:
        each.view(torch.uint8).sum(), each.detach(), each.clone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_sees_nothing_where_tensors_are_read(mode: Callable[[], AbstractContextManager[object]]) -> None:
    watched = tensors()
    with mode():
        watching = Watch(watched)
        read_all(watched)
        assert watching.sees_no_change(watched)
    read_all(watched)
    assert watching.sees_no_change(watched)
    watched[2].zero_()
    with mode():
        assert not watching.sees_no_change(watched)


def test_hooks_on_what_autograd_saves_neither_see_nor_hide_it() -> None:
    watched, packed = tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: torch.zeros(1)):
        watching = Watch(watched)
        assert watching.sees_no_change(watched)
        watched[0].zero_()
        assert not watching.sees_no_change(watched)
    assert packed == []


def test_keeps_neither_tensors_nor_data_alive() -> None:
    watched = tensors()
    watching = Watch(watched)
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in watched]
    watched[0].data = torch.empty(64, 32, dtype=watched[0].dtype)
    gone = weakref.ref(watched.pop())
    gc.collect()
    assert gone() is None
    assert [ref() is None for ref in memory] == [True, False, False, True]
    assert watching.saved is None


def in_buffer(buffer: bytearray) -> Tensor:
    """Storage of its own on these bytes: one that goes and one that comes are at the same address."""
    return torch.frombuffer(buffer, dtype=torch.uint8).view(64, 32).view(torch.float8_e4m3fn)


def test_memory_that_is_freed_and_comes_back_is_another() -> None:
    buffer = bytearray(64 * 32)
    weight = nn.Parameter(in_buffer(buffer), requires_grad=False)
    watching, address = Watch([weight]), weight.data_ptr()
    weight.data = torch.empty(0, dtype=weight.dtype)
    weight.data = in_buffer(buffer)
    assert weight.data_ptr() == address
    assert not watching.sees_no_change([weight])


def test_a_graph_whose_weight_comes_back_at_its_address_with_other_data_takes_the_other_data() -> None:
    model, x = nn.Sequential(layer(64, 32, bias=False)), rows(k=32)
    buffer = bytearray(64 * 32)
    model[0].weight = weight = nn.Parameter(in_buffer(buffer), requires_grad=False)
    compiled = torch.compile(model, backend=folding(dequant_at_load=True), fullgraph=True)
    with torch.no_grad():
        before = compiled(x)
        weight.data = torch.empty(0, dtype=weight.dtype)
        buffer[:] = bytes([0x38]) * len(buffer)  # all 1
        weight.data = in_buffer(buffer)
        assert_same(compiled(x), model(x))
    assert not torch.equal(before, model(x))


def test_identities_tell_the_same_objects_from_others() -> None:
    items = tuple(object() for _ in range(5))
    for identities in (watch._addresses_of_objects, watch._ids):
        same = identities(items)
        assert identities((*items,)) == same
        assert hash(identities((*items,))) == hash(same)
        for i in range(5):
            assert identities((*items[:i], object(), *items[i + 1 :])) != same
        assert identities(items[:4]) != same
        assert identities(items[::-1]) != same
    assert watch._tuples_are_addresses()


def test_entries_of_a_released_weight_stay_current_when_its_memory_goes() -> None:
    packed = layer()
    holder = packed.weight.detach()
    compiled = torch.compile(packed, backend=folding(dequant_at_load=True, release_quantized=True), fullgraph=True)
    with torch.no_grad():
        before = compiled(rows())
        epoch = store.epoch()
        del holder
        gc.collect()
        assert_same(compiled(rows()), before)
    assert store.epoch() == epoch
