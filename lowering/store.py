"""Dequantized weights, one for each (weight, scale, dtype), shared by every graph and recompile.

An entry lives as long as a compiled graph uses it and its weight lives; a released weight keeps its own
entry alive, since nothing else could make it again. Entries are refreshed in place, so that compiled code
and CUDA graphs see a stable address.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mxfp8_ops.convert import dequant_bounded

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

    def release(self) -> int:
        """Frees the packed bytes of the weight and returns how many; 0 if they cannot be freed now."""
        weight, scale = self.weight(), self.scale()
        if weight is None or scale is None or self.released:
            return 0
        with _lock:
            freed = weight.nbytes
            _release(weight)
            weight.mxfp8_entry = self  # type: ignore[attr-defined]
            self.released, self.seen = True, (scale._version, scale.data_ptr())
        return freed

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
            if is_released(weight):
                raise ValueError(
                    f"an MXFP8 weight of shape {list(weight.shape)} was released (release_quantized=True) and "
                    f"cannot be dequantized again as {dtype}: compile every dtype before releasing, or keep it"
                )
            found = _entries[key] = Entry(weight, scale, weight_view, scale_view, dtype)
        if not found.is_current(weight, scale):
            found.refresh(weight, scale)
        return found


def expire(tensors: Iterable[Tensor]) -> None:
    """Makes every entry made from one of ``tensors`` dequantize again at its next use."""
    ids = {id(tensor) for tensor in tensors}
    with _lock:
        for (weight, scale, _, _), found in list(_entries.items()):
            if (weight in ids or scale in ids) and not found.released:
                found.seen = None


# --- released weights ------------------------------------------------------------------------------------


def _metadata_getters() -> frozenset[Any]:
    properties = [
        "shape",
        "dtype",
        "device",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "layout",
        "ndim",
        "_version",
    ]
    properties += ["is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "nbytes", "itemsize"]
    methods = ["stride", "dim", "size", "numel", "element_size", "is_contiguous", "is_floating_point", "is_complex"]
    methods += ["is_inference", "get_device", "__len__", "__hash__", "storage_offset", "ndimension", "requires_grad_"]
    getters = {getattr(torch.Tensor, name).__get__ for name in properties}
    return frozenset(getters | {getattr(torch.Tensor, name) for name in methods})


_METADATA = _metadata_getters()


class Released:
    """A weight whose bytes are gone: it still has its shape, anything that would read it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling() or func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ValueError(
            "this MXFP8 weight was released after it was folded into a compiled graph (release_quantized=True): "
            f"{getattr(func, '__name__', func)} cannot read it; call the compiled model, or load the weight again"
        )


class ReleasedParameter(Released, nn.Parameter):
    """A released Parameter."""


class ReleasedTensor(Released, Tensor):
    """A released buffer or plain tensor."""


def is_released(tensor: object) -> bool:
    """Whether ``release_quantized=True`` freed the bytes of this tensor."""
    return isinstance(tensor, Released)


def _release(weight: Tensor) -> None:
    # Same shape, strides, dtype and device on no memory: compiled graphs are guarded on those. Other tensors
    # on the old storage keep it. torch would crash on reading the null pointer, so the class forbids it.
    empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    empty.untyped_storage().resize_(0)
    weight.data = empty
    weight.__class__ = ReleasedParameter if isinstance(weight, nn.Parameter) else ReleasedTensor


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, 0 once it was released."""
    return 0 if is_released(tensor) else tensor.nbytes
