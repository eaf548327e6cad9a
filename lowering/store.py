"""Weights in another form, one for each (weights, scales, form), shared by every graph and recompile.

An entry lives as long as a compiled graph uses it and its weights live; a released weight keeps its own
entries alive, since nothing else could make them again. Entries are refreshed in place, so that compiled code
and CUDA graphs see a stable address.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from . import released
from .forms import Form, Packed
from .watch import Watch, layouts

View: TypeAlias = Callable[[Tensor], Tensor]
Key: TypeAlias = tuple[tuple[int, ...], tuple[object, ...], Form]
"""Identities of the tensors; what was taken of each, and how it lay in memory; the form."""

_lock = threading.RLock()
_entries: weakref.WeakValueDictionary[Key, Entry] = weakref.WeakValueDictionary()
_epochs = itertools.count(1)
_epoch = 0


def epoch() -> int:
    """A number that changes whenever an entry may have become stale although its tensors look as before."""
    return _epoch


def _begin_epoch() -> None:
    global _epoch
    _epoch = next(_epochs)  # takes no lock: called by the garbage collector, too


class Entry:
    """The value of some weights and scales in a form: of several weights, with the rows of all.

    Args:
        tensors: weight, scale, weight, scale, ... . views: what is taken of each.

    Attributes:
        value: None once one of the tensors is gone.
    """

    def __init__(self, tensors: tuple[Tensor, ...], views: tuple[View, ...], form: Form) -> None:
        self.tensors = tuple(weakref.ref(tensor, self._drop) for tensor in tensors)
        self.views, self.form = views, form
        self.value: Tensor | None = None
        self.seen: Watch | None = None

    def is_current(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether ``value`` still belongs to these tensors as they are now: a replaced one has another
        identity, ``.data =`` another address, an in-place update another version.
        """
        if self.value is None or any(ref() is not tensor for ref, tensor in zip(self.tensors, tensors, strict=True)):
            return False
        return self.seen is not None and self.seen.sees_no_change(_changeable(tensors))

    def refresh(self, tensors: tuple[Tensor, ...]) -> None:
        """Makes the value again, in the same memory."""
        with _lock:
            if self.is_current(tensors):
                return
            if any(map(released.is_released, tensors)):
                what = "the scale of" if len(tensors) == 2 else "a weight or scale merged with those of"
                raise ValueError(
                    f"{what} a released MXFP8 weight was changed: release_quantized=True freed the bytes "
                    "that would be needed; load the model again, or compile it without release_quantized"
                )
            # Outside of inference mode: its tensors could neither be saved for backward nor updated later.
            with torch.inference_mode(False), torch.no_grad():
                seen = Watch(tensors)
                viewed = [view(tensor) for view, tensor in zip(self.views, tensors, strict=True)]
                weight, scale = (
                    each[0] if len(each) == 1 else _rows_of_all(each) for each in (viewed[::2], viewed[1::2])
                )
                expected, value = self.form.empty(weight.to("meta")), self.value
                fits = value is not None and value.shape == expected.shape and value.device == weight.device
                self.value = self.form.make(weight, scale, value if fits else None)
                self.seen = seen

    def _drop(self, _: object) -> None:
        self.value = None
        _begin_epoch()  # another tensor may get the place, the version and so the looks of the one that is gone


def _changeable(tensors: Iterable[Tensor]) -> list[Tensor]:
    """All but those that were released."""
    return [tensor for tensor in tensors if not released.is_released(tensor)]


def _rows_of_all(tensors: list[Tensor]) -> Tensor:
    joined = torch.cat([tensor.view(torch.uint8) for tensor in tensors])
    return joined.view(tensors[0].dtype)


def entry(tensors: tuple[Tensor, ...], views: tuple[View, ...], text: str, form: Form) -> Entry:
    """The entry of these tensors, made when there is none. ``text`` names the views. A graph is for tensors of certain
    shapes and strides, which ``.data =`` may change: with others they have another entry.

    Raises:
        ValueError: a weight was released, and not in this form.
    """
    key = (tuple(map(id, tensors)), (text, *layouts(tensors)), form)
    with _lock:
        found = _entries.get(key)
        if found is None or any(ref() is not tensor for ref, tensor in zip(found.tensors, tensors, strict=True)):
            gone = next(filter(released.is_released, tensors), None)
            if gone is not None:
                raise ValueError(
                    f"an MXFP8 weight of shape {list(gone.shape)} was released (release_quantized=True) and cannot be "
                    f"{form} again: compile every dtype and every way to merge it before releasing, or keep it"
                )
            found = _entries[key] = Entry(tensors, views, form)
        if not found.is_current(tensors):
            found.refresh(tensors)
        return found


def packed_form(weight: object) -> Packed | None:
    """The form in which a weight is packed already, alone or with others; None if it is not."""
    with _lock:
        for key, found in list(_entries.items()):
            if isinstance(found.form, Packed) and id(weight) in key[0] and _made_of(found, weight):
                return found.form
    return None


def release(source: Tensor) -> None:
    """Frees the bytes of a weight or a scale. Its entries now live as long as it does: nothing could make them
    again.
    """
    with _lock:
        entries = [found for key, found in list(_entries.items()) if id(source) in key[0] and _made_of(found, source)]
        released.release(source)
        for each in entries:
            tensors = [ref() for ref in each.tensors]
            alive = [tensor for tensor in tensors if tensor is not None]
            each.seen = Watch(_changeable(alive)) if len(alive) == len(tensors) else None
        source.mxfp8_entries = entries  # type: ignore[attr-defined]
        _begin_epoch()


def _made_of(found: Entry, tensor: object) -> bool:
    return any(ref() is tensor for ref in found.tensors)


def expire(tensors: Iterable[Tensor]) -> None:
    """Makes every entry made from one of ``tensors`` again at its next use."""
    ids = {id(tensor) for tensor in tensors}
    with _lock:
        for (parts, _, _), found in list(_entries.items()):
            alive = [tensor for ref in found.tensors if (tensor := ref()) is not None]
            if ids.intersection(parts) and not any(map(released.is_released, alive)):
                found.seen = None
        _begin_epoch()
