"""Dequantized weights, one for each (weight, scale, dtype), shared by every graph and recompile.

An entry lives as long as a compiled graph uses it and its weight lives; a released weight keeps its own
entry alive, since nothing else could make it again. Entries are refreshed in place, so that compiled code
and CUDA graphs see a stable address.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mxfp8_ops.convert import dequant_bounded

from . import released

View = Callable[[Tensor], Tensor]
Key = tuple[int, int, str, torch.dtype]

_lock = threading.RLock()
_entries: weakref.WeakValueDictionary[Key, Entry] = weakref.WeakValueDictionary()


class Entry:
    """The dequantized value of ``weight_view(weight)`` and ``scale_view(scale)``.

    Attributes:
        value: the dequantized tensor, None once the weight is gone.
        released: whether the packed bytes of the weight were freed.
    """

    def __init__(self, weight: Tensor, scale: Tensor, weight_view: View, scale_view: View, dtype: torch.dtype) -> None:
        self.weight = weakref.ref(weight, self._drop)
        self.scale = weakref.ref(scale, self._drop)
        self.weight_view, self.scale_view, self.dtype = weight_view, scale_view, dtype
        self.value: Tensor | None = None
        self.seen: tuple[int, ...] | None = None
        self.released = False

    def is_current(self, weight: Tensor, scale: Tensor) -> bool:
        """Whether ``value`` still belongs to these two tensors as they are now: a replaced one has another
        identity, ``.data =`` another address, an in-place update another version.
        """
        if self.weight() is not weight or self.scale() is not scale or self.value is None:
            return False
        if self.released:
            return self.seen == (scale._version, scale.data_ptr())
        return self.seen == (weight._version, scale._version, weight.data_ptr(), scale.data_ptr())

    def refresh(self, weight: Tensor, scale: Tensor) -> None:
        """Dequantizes again, into the same memory."""
        with _lock:
            if self.is_current(weight, scale):
                return
            if self.released:
                raise ValueError(
                    "the scale of a released MXFP8 weight was changed: release_quantized=True freed the bytes "
                    "that would be needed; load the model again, or compile it without release_quantized"
                )
            # Outside of inference mode: its tensors could neither be saved for backward nor updated later.
            with torch.inference_mode(False), torch.no_grad():
                seen = (weight._version, scale._version, weight.data_ptr(), scale.data_ptr())
                packed, scales = self.weight_view(weight), self.scale_view(scale)
                fits = self.value is not None and self.value.shape == packed.shape
                reusable = self.value if fits and self.value.device == packed.device else None  # type: ignore[union-attr]
                self.value = dequant_bounded(packed, scales, self.dtype, out=reusable)
                self.seen = seen

    def _drop(self, _: object) -> None:
        self.value = None


def entry(weight: Tensor, scale: Tensor, weight_view: View, scale_view: View, views: str, dtype: torch.dtype) -> Entry:
    """The entry of these two tensors, made when there is none. ``views`` names the two view functions.

    Raises:
        ValueError: the weight was released, and not as this dtype.
    """
    key = (id(weight), id(scale), views, dtype)
    with _lock:
        found = _entries.get(key)
        if found is None or found.weight() is not weight or found.scale() is not scale:
            if released.is_released(weight):
                raise ValueError(
                    f"an MXFP8 weight of shape {list(weight.shape)} was released (release_quantized=True) and "
                    f"cannot be dequantized again as {dtype}: compile every dtype before releasing, or keep it"
                )
            found = _entries[key] = Entry(weight, scale, weight_view, scale_view, dtype)
        if not found.is_current(weight, scale):
            found.refresh(weight, scale)
        return found


def release(weight: Tensor) -> None:
    """Frees the packed bytes of ``weight``. Its entries now live as long as it does: nothing could make them
    again.
    """
    with _lock:
        entries = [found for key, found in list(_entries.items()) if key[0] == id(weight) and found.weight() is weight]
        released.release(weight)
        for each in entries:
            scale = each.scale()
            each.released = True
            each.seen = None if scale is None else (scale._version, scale.data_ptr())
        weight.mxfp8_entries = entries  # type: ignore[attr-defined]


def expire(tensors: Iterable[Tensor]) -> None:
    """Makes every entry made from one of ``tensors`` dequantize again at its next use."""
    ids = {id(tensor) for tensor in tensors}
    with _lock:
        for (weight, scale, _, _), found in list(_entries.items()):
            if (weight in ids or scale in ids) and not found.released:
                found.seen = None
