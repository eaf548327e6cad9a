"""Whether tensors are still as they were. Compiled graphs ask it at every call, so C answers it, for all at once."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compat


class Watch:
    """Tensors as they are now: an update in place changes a tensor's version, ``.data =`` its address. Keeps neither
    the tensors nor their data alive.

    Another thread that changes them meanwhile may go unnoticed: whoever begins to watch looks at them afterwards.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.saved = _in_a_thread_of_its_own(tensors)
        self.are_in_place = compat.addresses(tensors)
        # Memory that was freed may come back to the tensor that it was of, at the same address, with other contents.
        self.memory = [weakref.ref(tensor.untyped_storage(), self._forget) for tensor in tensors]

    def sees_no_change(self, tensors: Sequence[Tensor]) -> bool:
        """Whether none of the tensors, which must be the same, was changed since."""
        saved = self.saved
        if saved is None:
            return False
        try:
            saved.grad_fn.saved_tensors  # noqa: B018  raises if one was updated in place
        except RuntimeError:
            return False
        return self.are_in_place(tensors)

    def _forget(self, _: object) -> None:
        self.saved = None


class _Saved(torch.autograd.Function):
    """Autograd compares the versions of all tensors that it saved when it hands them out, which takes half of the time
    of reading them one by one.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return result.clone()


def _in_a_thread_of_its_own(tensors: Sequence[Tensor]) -> Any:
    """A tensor whose ``grad_fn`` has saved these, without their data. In another thread no mode is on that the caller
    may be in, and no hook that takes what autograd saves elsewhere.
    """
    made: list[Tensor] = []

    def save() -> None:
        result = torch.zeros(1, requires_grad=True, device="cpu")
        made.append(_Saved.apply(result, *map(_without_data, tensors)))

    thread = threading.Thread(target=save)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is about to end: without a watch everything is made again in every call
        return None
    thread.join()
    return made[0]


def _without_data(tensor: Tensor) -> Tensor:
    """Shares only the tensor's version counter."""
    alias = tensor.detach()
    alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias


def layouts(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, tuple[int, ...]]]:
    """Shapes and strides, which ``.data =`` may change where the address stays. Dynamo's guards see that, but not under
    freezing.
    """
    return [(tensor.size(), tensor.stride()) for tensor in tensors]


def _addresses_of_objects(items: tuple[object, ...]) -> Hashable:
    """What CPython's tuple of these objects is: their addresses, which ``id`` would tell one by one."""
    return ctypes.string_at(id(items) + tuple.__basicsize__, len(items) * ctypes.sizeof(ctypes.c_void_p))


def _ids(items: tuple[object, ...]) -> Hashable:
    return tuple(map(id, items))


def _tuples_are_addresses() -> bool:
    """Whether this Python is one of which that is true."""
    if sys.implementation.name != "cpython":
        return False
    probe = (object(), None, object())
    expected = b"".join(id(each).to_bytes(ctypes.sizeof(ctypes.c_void_p), sys.byteorder) for each in probe)
    return _addresses_of_objects(probe) == expected


identities = _addresses_of_objects if _tuples_are_addresses() else _ids
"""Tells which objects a tuple holds, and is the same for another tuple of the same objects."""
