"""How programs leave sums to each other, on the CPU: programs are threads, and memory is a tensor's. On the chip itself
it is in tests/test_gpu_packed_plans.py.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from simulating import Array, array

from mxfp8_ops.gpu import partial_sums

TILE = 64, 32


class Pointer:
    """A pointer to int32 or int64, or pointers."""

    def __init__(self, memory: Tensor, places: Any = 0) -> None:
        self.memory, self.places = memory, places

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.places + offset)

    def to(self, dtype: torch.dtype) -> Pointer:
        return Pointer(self.memory.view(dtype), self.places * self.memory.itemsize // dtype.itemsize)

    def load(self) -> Array:
        return array(self.memory[self.places])

    def store(self, value: Any) -> None:
        self.memory[self.places] = value


@pytest.fixture
def gluon(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of ``partial_sums`` in Python."""
    found = SimpleNamespace(
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        pointer_type=lambda dtype: dtype,
        BlockedLayout=lambda *bases: None,
        num_warps=lambda: 4,
        arange=lambda first, end, layout: torch.arange(first, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        minimum=lambda one, other: one.clamp(max=other) if isinstance(one, Tensor) else min(one, other),
        max=lambda tensor, axis: tensor.amax(axis),
        reshape=torch.reshape,
        permute=torch.permute,
        convert_layout=lambda tensor, layout, assert_trivial: tensor,
        store=Pointer.store,
        load=lambda pointer, cache_modifier: pointer.load(),
        atomic_xchg=lambda pointer, value, sem, scope: pointer.store(value),
        inline_asm_elementwise=lambda text, constraints, args, *_: args[0].load(),
    )
    monkeypatch.setattr(partial_sums, "gl", found)
    monkeypatch.setattr(partial_sums, "barrier", lambda: time.sleep(0))
    for name in ("_wait_for", "_place", "_words", "_in_order_of_registers", "_as_before"):
        monkeypatch.setattr(partial_sums, name, getattr(partial_sums, name).fn)
    return found


def leave(total: Tensor, memory: Tensor, slot: int, slots: int) -> None:
    place = torch.tensor(slot)
    partial_sums.store_sums.fn(array(total), Pointer(memory), place)
    partial_sums.say_stored.fn(Pointer(memory), partial_sums.STORED, place, torch.tensor(slots), total.numel())


def collect(total: Tensor, memory: Tensor, first: int, count: int, slots: int, into: list[Tensor]) -> None:
    place = torch.tensor(first)
    partial = Pointer(memory)
    into.append(
        partial_sums.add_stored.fn(array(total), partial, partial_sums.STORED, place, count, torch.tensor(slots))
    )


@pytest.mark.parametrize("count", [1, 2, 7, 32, 33, 70])
def test_who_adds_sums_waits_for_all_of_them_and_adds_them_in_order(gluon: SimpleNamespace, count: int) -> None:
    """Again in the same memory, in which nothing of the time before is taken for new. Other slots do not matter."""
    first, slots = 2, count + 4
    memory = partial_sums.memory(slots, 64 * 32, torch.device("cpu")).random_()
    leave(torch.full(TILE, torch.nan), memory, 0, slots)
    for turn in range(2):
        torch.manual_seed(turn)
        mine, *others = torch.randn(count + 1, *TILE)
        found: list[Tensor] = []
        program = threading.Thread(target=collect, args=(mine, memory, first, count, slots, found), daemon=True)
        program.start()
        for i in range(count) if turn else reversed(range(count)):
            time.sleep(0.05 / count)
            assert not found
            leave(others[i], memory, first + i, slots)
        program.join(30)
        expected = mine
        for other in others:
            expected = expected + other
        assert len(found) == 1
        assert torch.equal(found[0].as_subclass(Tensor), expected)


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, 256])
def test_a_tile_comes_back_in_its_order(gluon: SimpleNamespace, rows: int) -> None:
    for columns in (64, 128):
        tile = array(torch.randn(columns, rows))
        flat = partial_sums._in_order_of_registers(tile)
        assert flat.shape == (columns * rows,)
        assert torch.equal(partial_sums._as_before(flat, tile).as_subclass(Tensor), tile.as_subclass(Tensor))
