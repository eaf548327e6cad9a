"""How programs leave sums to each other, on the CPU: programs are threads, and memory is a tensor's. On the chip itself
it is in tests/test_gpu_packed_plans.py.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from simulating import GLUON, Pointer, array, in_python

from mxfp8_ops.gpu import partial_sums

Sums: TypeAlias = list[Tensor]
"""Of a tile: of its first rows of x and, where it has more than a power of two, of those after them."""


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    gluon = SimpleNamespace(
        **GLUON,
        pointer_type=lambda dtype: dtype,
        num_warps=lambda: 4,
        atomic_xchg=lambda pointer, value, sem, scope: pointer.store(torch.tensor(value)),
    )
    gluon.inline_asm_elementwise = lambda text, constraints, args, *_: args[0].load()
    in_python(monkeypatch, partial_sums, gluon)
    monkeypatch.setattr(partial_sums, "barrier", lambda: None)


def leave(sums: Sums, memory: Tensor, slot: int, slots: int) -> None:
    partial, place, size = Pointer(memory), torch.tensor(slot), sum(total.numel() for total in sums)
    partial_sums.store_sums([array(total) for total in sums], partial, place)
    partial_sums.say_stored(partial, partial_sums.STORED, place, torch.tensor(slots), size)


def collect(sums: Sums, memory: Tensor, first: int, count: int, slots: int, into: list[Sums]) -> None:
    slot, all_slots, mine = torch.tensor(first), torch.tensor(slots), [array(total) for total in sums]
    found = partial_sums.add_stored(mine, Pointer(memory), partial_sums.STORED, slot, count, all_slots)
    into.append([total.as_subclass(Tensor) for total in found])


def random_sums(rows: tuple[int, ...]) -> Sums:
    return [torch.randn(64, each) for each in rows]


@pytest.mark.parametrize("rows", [(32,), (32, 8)])
@pytest.mark.parametrize("count", [1, 2, 7, 32, 33, 70])
def test_who_adds_sums_waits_for_all_of_them_and_adds_them_in_order(count: int, rows: tuple[int, ...]) -> None:
    """Again in the same memory, in which nothing of the time before is taken for new. Other slots do not matter."""
    first, slots = 2, count + 4
    memory = partial_sums.memory(slots, 64 * sum(rows), torch.device("cpu")).random_()
    leave([torch.full((64, each), torch.nan) for each in rows], memory, 0, slots)
    for turn in range(2):
        torch.manual_seed(turn)
        mine, *others = (random_sums(rows) for _ in range(count + 1))
        found: list[Sums] = []
        program = threading.Thread(target=collect, args=(mine, memory, first, count, slots, found), daemon=True)
        program.start()
        for i in range(count) if turn else reversed(range(count)):
            time.sleep(0.05 / count)
            assert not found
            leave(others[i], memory, first + i, slots)
        program.join(30)
        expected = mine
        for other in others:
            expected = [one + more for one, more in zip(expected, other, strict=True)]
        assert len(found) == 1
        assert all(map(torch.equal, found[0], expected))


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, 256])
def test_a_tile_comes_back_in_its_order(rows: int) -> None:
    for columns in (64, 128):
        tile = array(torch.randn(columns, rows))
        flat = partial_sums.in_order_of_registers(tile)
        assert flat.shape == (columns * rows,)
        assert torch.equal(partial_sums.as_before(flat, tile).as_subclass(Tensor), tile.as_subclass(Tensor))
