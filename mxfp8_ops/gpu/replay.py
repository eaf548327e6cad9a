"""Calls that have been seen before, made again with little host time.

Between an operator and its kernels lie checks, the choice of a kernel and of its plan, views and copies that turn out
not to be needed: some 50 us, and the answer is the same for all calls whose tensors have the same shapes, dtypes and
device. When such a problem is met for the second time it is computed as always, but watched, and what it launched is
kept. Later calls allocate what those launches write, and launch.

A computation is kept only if it did nothing else: it opened memory, looked at tensors in other shapes, and launched
kernels directly (see ``launch``) on whole tensors of the call or on memory that it opened. A call is made again only if
its tensors are as those were, contiguous and at multiples of 16 bytes, on the current device, and if nobody watches
launches. Otherwise it is computed as always.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import settings

if TYPE_CHECKING:
    from .launch import Launched

PROBLEMS = 4096
"""Problems that are remembered; with more all are forgotten."""

TRIES = 3
"""How often a problem is watched: what it does may be different once, while it is tuned or others watch launches."""

Tensors: TypeAlias = tuple[Tensor | None, ...]

_replays: dict[Hashable, Replay] = {}
_met: dict[Hashable, int] = {}
"""How often a problem was computed, up to the last try."""


def again(name: str, tensors: Tensors, extra: Hashable = None) -> Tensor | None:
    """The result of an operator, as ``learn`` has seen it computed; None if it must be computed as always.

    Args:
        name: of the operator.
        tensors: all its tensors, not yet checked; they are not wrapped or lazy in any way.
        extra: its other arguments.
    """
    if not _replays:
        return None
    replay = _replays.get(_problem(name, tensors, extra))
    return None if replay is None else replay(tensors)


def learn(name: str, tensors: Tensors, extra: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """The result of ``compute``, which reads nothing of the tensors but their memory, shape, dtype and device.

    Args:
        name, tensors, extra: see ``again``; checked.
        compute: without effects but launches.
    """
    problem = _problem(name, tensors, extra)
    met = _met.get(problem, 0)
    if met > TRIES or problem in _replays or not _plain(tensors) or torch.cuda.is_current_stream_capturing():
        return compute()
    _remember(problem, met + 1)
    if met == 0:  # compiles, and tunes
        return compute()
    from . import launch

    with launch.recorded() as launches, _Opened() as opened:
        out = compute()
    replay = None if opened.others else _replay(tensors, out, opened.tensors, launches)
    if replay is not None:
        _replays[problem] = replay
    return out


def forget() -> None:
    """Everything is computed as always again, until it has been met twice."""
    _met.clear()
    _replays.clear()


def _remember(problem: Hashable, times: int) -> None:
    if len(_met) >= PROBLEMS and problem not in _met:
        forget()
    _met[problem] = times


def _problem(name: str, tensors: Tensors, extra: Hashable) -> Hashable:
    """Everything that decides how a call is computed, but for where its tensors lie."""
    problem = [name, extra, settings.launch()]
    for tensor in tensors:
        if tensor is None:
            problem.append(None)
        else:
            problem += (tensor.shape, tensor.dtype, tensor.get_device())
    return tuple(problem)


def _plain(tensors: Tensors) -> bool:
    device = torch.cuda.current_device()
    return all(
        tensor.is_cuda and tensor.get_device() == device and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        for tensor in tensors
        if tensor is not None
    )


class _Opened(TorchDispatchMode):
    """The tensors that are allocated, and whether operators run that do more than look at a tensor in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.tensors.append(result)
        elif func not in _LOOKS:
            self.others = True
        return result


_aten = torch.ops.aten
_LOOKS = (
    _aten.view.default,
    _aten.view.dtype,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.reshape.default,  # may copy; what is launched on a copy is not kept
    _aten.alias.default,
    _aten.detach.default,
)


# --- what is launched again ------------------------------------------------------------------------------


_Memory: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor to be allocated."""


class _Step(NamedTuple):
    """A launch: its arguments, in which ``moving`` places are filled in with the pointer of a tensor by its number or,
    for a descriptor, with that pointer and ``described`` shape and strides.
    """

    direct: Callable[[tuple[int, ...], int, list[Any]], None]
    grid: tuple[int, ...]
    values: tuple[Any, ...]
    moving: tuple[tuple[int, int], ...]
    described: tuple[tuple[int, int, tuple[int, ...], tuple[int, ...]], ...]


class Replay:
    """Launches what another call with such tensors has launched.

    Args:
        device: on which it was, by its index.
        memory: what is to be allocated, the result first.
        steps: the launches. Tensors are numbered: those of the call, then those of ``memory``.
        kernels: that are launched.
    """

    def __init__(self, device: int, memory: tuple[_Memory, ...], steps: tuple[_Step, ...], kernels: frozenset[Any]):
        from triton.runtime.driver import driver

        from .launch import watched

        self._device = device
        self._memory = memory
        self._steps = steps
        self._kernels = kernels
        self._watched = watched
        self._driver = driver
        self._empty = _empty()

    def __call__(self, tensors: Tensors) -> Tensor | None:
        active = self._driver.active
        if active.get_current_device() != self._device:
            return None
        for kernel in self._kernels:
            if self._watched(kernel):
                return None
        pointers = []
        together = 0
        for tensor in tensors:
            if tensor is not None:
                if not tensor.is_contiguous():
                    return None
                pointer = tensor.data_ptr()
                together |= pointer
                pointers.append(pointer)
        if together % 16:
            return None
        opened = []
        for shape, strides, dtype in self._memory:
            tensor = self._empty(shape, strides, dtype)
            pointers.append(tensor.data_ptr())
            opened.append(tensor)
        stream = active.get_current_stream(self._device)
        for direct, grid, fixed, moving, described in self._steps:
            values = list(fixed)
            for place, source in moving:
                values[place] = pointers[source]
            for place, source, shape, strides in described:
                values[place] = pointers[source], shape, strides
            direct(grid, stream, values)
        return opened[0]


def _replay(tensors: Tensors, out: Tensor, opened: list[Tensor], launches: list[Launched | None]) -> Replay | None:
    """None if a launch was not direct, or is on anything but the tensors, the result, and what was opened."""
    given = [tensor for tensor in tensors if tensor is not None]
    scratch = [tensor for tensor in opened if tensor.data_ptr() != out.data_ptr()]
    if len(scratch) != len(opened) - 1 or not out.is_contiguous():
        return None
    known = [*given, out, *scratch]
    places = {tensor.data_ptr(): place for place, tensor in enumerate(known)}
    if len(places) != len(known) or any(pointer % 16 for pointer in places):
        return None
    steps = []
    for launched in launches:
        step = None if launched is None else _step(launched, places)
        if step is None:
            return None
        steps.append(step)
    if not any(place[1] == len(given) for step in steps for place in (*step.moving, *step.described)):
        return None  # whoever has written the result, it was none of these
    memory = tuple((tuple(each.shape), each.stride(), each.dtype) for each in (out, *scratch))
    kernels = frozenset(launched.kernel for launched in launches if launched is not None)
    return Replay(out.get_device(), memory, tuple(steps), kernels)


def _step(launched: Launched, places: dict[int, int]) -> _Step | None:
    values: list[Any] = []
    moving = []
    described = []
    for place, arg in enumerate(launched.args):
        tensor = arg[0] if type(arg) is tuple else arg
        if not isinstance(tensor, Tensor):
            values.append(arg)
            continue
        source = places.get(tensor.data_ptr())
        if source is None:
            return None
        if tensor is arg:
            moving.append((place, source))
        else:
            described.append((place, source, arg[2], arg[3]))
        values.append(None)
    return _Step(launched.direct, launched.grid, tuple(values), tuple(moving), tuple(described))


@functools.cache
def _empty() -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """``torch.empty_strided`` on the current device, in half the time: Inductor's generated code allocates so."""
    try:
        from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
    except ImportError:
        return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
    return _empty_strided_cuda
