"""Calls that are made again from what was launched before, without a device: see absent_device for how."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import absent_device
from absent_device import BOX, Device, OnDevice, add, copy, hooked, plain

from mxfp8_ops.gpu import dispatch, replay
from mxfp8_ops.gpu.launch import launch

device = absent_device.device


class OnFirst(OnDevice):
    """On the first device."""

    def get_device(self) -> int:
        return 0


def on_first(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnFirst)


def opened(*shape: int) -> Tensor:
    return torch.empty(shape).as_subclass(OnFirst)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        replay, "_empty", lambda: lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )
    replay.forget()
    yield
    replay.forget()


class Operator:
    """Adds ``more`` to x on the device that is not there, and counts how often that is computed as always."""

    def __init__(self, compute: Callable[[Tensor], Tensor] | None = None) -> None:
        self.compute = compute or self.add
        self.computed = 0

    def add(self, x: Tensor, more: int = 3) -> Tensor:
        out = opened(*x.shape)
        launch(add, (2, 3), (x, out, x.numel(), more, True, 0.5), (64, "name"), num_warps=2)
        return out

    def __call__(self, x: Tensor, other: Tensor | None = None, extra: Any = None) -> Tensor:
        out = replay.again("op", (x, other), extra)
        if out is not None:
            return out
        self.computed += 1
        return replay.learn("op", (x, other), extra, lambda: self.compute(x))

    def settled(self, x: Tensor) -> Operator:
        """Calls it until nothing new comes of it."""
        for _ in range(replay.TRIES + 1):
            self(x)
        self.computed = 0
        return self


# --- what is launched -----------------------------------------------------------------------------------


def test_a_problem_met_twice_is_launched_again_as_triton_would(device: Device) -> None:
    operator = Operator()
    for count in (1, 2, 2, 2):
        x = on_first(4, 16)
        out = operator(x)
        assert operator.computed == count
        assert (out.shape, out.stride(), out.dtype) == ((4, 16), (16, 1), torch.float32)
        launched = device.last()
        add[(2, 3)](x, out.as_subclass(OnFirst), 64, 3, True, 0.5, 64, "name", num_warps=2)
        assert device.last() == launched


def test_every_call_writes_into_new_memory(device: Device) -> None:
    operator, x = Operator().settled(on_first(64)), on_first(64)
    outs = [operator(x) for _ in range(5)]
    assert operator.computed == 0
    assert len({out.data_ptr() for out in [x, *outs]}) == 6


def test_several_launches_go_out_in_order_with_their_scratch_and_descriptors(device: Device) -> None:
    def compute(x: Tensor) -> Tensor:
        out, _unused, scratch = opened(32, 64), opened(7), opened(128)
        launch(copy, (1,), ((x, BOX, (64, 64), (64, 1)), scratch, 7), (32,))
        launch(add, (1,), (scratch, out, 64, 3, True, None), (64, "name"))
        return out

    operator = Operator(compute).settled(on_first(64, 64, dtype=torch.bfloat16))
    x = on_first(64, 64, dtype=torch.bfloat16)
    device.calls.clear()
    out = operator(x)
    assert operator.computed == 0
    first, second = map(plain, device.calls)
    device.calls.clear()
    kept = compute(x)
    expected = [plain(call) for call in device.calls]
    assert len(expected) == 2
    shared = {value for value in leaves(first) if value in leaves(second) and value > 2**32}
    shared_expected = {value for value in leaves(expected[0]) if value in leaves(expected[1]) and value > 2**32}
    renamed = {**dict(zip(shared, shared_expected, strict=True)), out.data_ptr(): kept.data_ptr()}
    assert len(shared) == 1, "the scratch"
    assert [mapped(call, renamed) for call in (first, second)] == expected


def leaves(value: Any) -> set[int]:
    if isinstance(value, tuple):
        return set().union(*map(leaves, value)) if value else set()
    return {value} if type(value) is int else set()


def mapped(value: Any, names: dict[int, int]) -> Any:
    if isinstance(value, tuple):
        return tuple(mapped(each, names) for each in value)
    return names.get(value, value) if type(value) is int else value


def test_launches_go_to_the_stream_that_is_current(device: Device) -> None:
    operator = Operator().settled(on_first(64))
    for stream in (7, 8, 9):
        device.stream = stream
        operator(on_first(64))
        assert device.last()[3] == stream
    assert operator.computed == 0


def test_inference_mode_at_the_time_of_the_call_decides(device: Device) -> None:
    operator, x = Operator().settled(on_first(64)), on_first(64)
    assert not operator(x).is_inference()
    with torch.inference_mode():
        assert operator(x).is_inference()
    assert operator.computed == 0


def test_what_is_kept_keeps_no_tensor_alive(device: Device) -> None:
    x = on_first(64)
    alive = weakref.ref(x)
    Operator().settled(x)
    device.calls.clear()
    del x
    assert alive() is None


# --- what is computed as always -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        on_first(32),
        on_first(64, 1),
        on_first(64, dtype=torch.float16),
        on_first(128)[::2],
        on_first(65)[1:],
    ],
    ids=["shape", "rank", "dtype", "strides", "address"],
)
def test_other_tensors_are_another_problem(device: Device, x: Tensor) -> None:
    operator = Operator().settled(on_first(64))
    operator(x)
    assert operator.computed == 1


def test_other_arguments_are_another_problem(device: Device) -> None:
    operator, x = Operator().settled(on_first(64)), on_first(64)
    operator(x, extra=1)
    operator(x, on_first(64))
    assert operator.computed == 2


def off(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setenv("MXFP8_KERNELS", "off")


def tuned(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setenv("MXFP8_AUTOTUNE", "1")


def dependent(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setenv("MXFP8_DEPENDENT_LAUNCH", "1")


def seen(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    hooked(monkeypatch)


def elsewhere(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(device, "get_current_device", lambda: 1)


def forgotten(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(dispatch, "_gluon", True)
    with pytest.warns(UserWarning, match="Gluon fail"):
        dispatch._do_without_gluon(RuntimeError("no"))


@pytest.mark.parametrize("change", [off, tuned, dependent, seen, elsewhere, forgotten])
def test_whatever_the_answer_depends_on_is_looked_at_in_every_call(
    device: Device, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch, Device], None]
) -> None:
    operator, x = Operator().settled(on_first(64)), on_first(64)
    operator(x)
    assert operator.computed == 0
    change(monkeypatch, device)
    assert replay.again("op", (x, None)) is None


def more(x: Tensor) -> Tensor:
    return Operator().add(x).add_(1)


def zeros(x: Tensor) -> Tensor:
    out, counters = opened(64), torch.zeros(64).as_subclass(OnFirst)
    launch(add, (1,), (counters, out, 64, 3, True, 0.5), (64, "name"))
    return out


def on_a_copy(x: Tensor) -> Tensor:
    return Operator().add(x.clone())


def on_a_reshaped_copy(x: Tensor) -> Tensor:
    return Operator().add(x.view(8, 8).t().reshape(64))


def on_a_part(x: Tensor) -> Tensor:
    out = opened(64)
    launch(add, (1,), (x[32:], out, 32, 3, True, 0.5), (64, "name"))
    return out


def on_a_constant(x: Tensor) -> Tensor:
    out = opened(64)
    launch(add, (1,), (CONSTANT, out, 64, 3, True, 0.5), (64, "name"))
    return out


CONSTANT = on_first(64)


def part_of_the_result(x: Tensor) -> Tensor:
    return Operator().add(x)[32:]


def beside_the_result(x: Tensor) -> Tensor:
    Operator().add(x)
    return opened(64)


def the_argument(x: Tensor) -> Tensor:
    launch(add, (1,), (x, x, 64, 3, True, 0.5), (64, "name"))
    return x


def through_triton(x: Tensor) -> Tensor:
    out = opened(64)
    add[(1,)](x, out, 64, 3, True, 0.5, 64, "name")
    return out


def partly_through_triton(x: Tensor) -> Tensor:
    out = Operator().add(x)
    launch(add, (1,), (torch.zeros(64), out, 64, 3, True, 0.5), (64, "name"))  # memory of the host
    return out


@pytest.mark.parametrize(
    "compute",
    [
        more,
        zeros,
        on_a_copy,
        on_a_reshaped_copy,
        on_a_part,
        on_a_constant,
        part_of_the_result,
        beside_the_result,
        the_argument,
        through_triton,
        partly_through_triton,
    ],
    ids=lambda compute: compute.__name__,
)
def test_what_does_more_than_launch_on_its_tensors_is_computed_in_every_call(
    device: Device, compute: Callable[[Tensor], Tensor]
) -> None:
    operator, x = Operator(compute).settled(on_first(64)), on_first(64)
    operator(x)
    assert operator.computed == 1
    assert replay._replays == {}


def test_nothing_is_learned_while_a_graph_is_captured(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        Operator().settled(on_first(64))
    assert replay._met == {}


def test_a_problem_that_was_watched_by_others_once_is_tried_again(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, x = Operator(), on_first(64)
    operator(x)
    with monkeypatch.context() as patch:
        hooked(patch)
        operator(x)
    operator(x)
    operator(x)
    assert operator.computed == 3


def test_so_many_problems_are_remembered_and_no_more(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "PROBLEMS", 4)
    operator = Operator()
    for n in range(64, 96):
        operator.settled(on_first(n))
        assert len(replay._replays) <= len(replay._met) <= 4
    operator(on_first(95))
    assert operator.computed == 0
