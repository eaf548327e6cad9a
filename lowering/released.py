"""Weights whose packed bytes were freed (``release_quantized=True``): a shape without data.

Torch crashes on reading freed memory, so a released weight changes its class to one that raises instead.
Compiled graphs, which are guarded on shape, strides, dtype and device, notice nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import compat


def _metadata_getters() -> frozenset[Any]:
    """The functions of Tensor that read no data, as ``__torch_function__`` sees them."""
    flags = [name for name in dir(Tensor) if name.lstrip("_").startswith("is_")]
    names = set(flags) - {"is_nonzero", "is_pinned", "is_shared", "is_set_to"}
    names |= {"shape", "ndim", "dtype", "device", "layout", "nbytes", "itemsize", "_version"}
    names |= {"requires_grad", "requires_grad_", "grad", "grad_fn", "__len__", "__hash__", "get_device"}
    names |= {"size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset"}
    functions = [getattr(Tensor, name) for name in names]
    return frozenset(function if callable(function) else function.__get__ for function in functions)


_METADATA = _metadata_getters()


class Released:
    """A weight whose bytes are gone: it still has its shape, anything that would read it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if compat.is_tracing() or func in _METADATA:
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


def release(weight: Tensor) -> None:
    """Frees the bytes of ``weight``, in place; other tensors on the same storage keep it alive."""
    empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    empty.untyped_storage().resize_(0)
    weight.data = empty
    weight.__class__ = ReleasedParameter if isinstance(weight, nn.Parameter) else ReleasedTensor


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, 0 once it was released."""
    return 0 if is_released(tensor) else tensor.nbytes


def _forms(tensor: object) -> str:
    """In which forms there still is a released weight: they are kept with it by lowering/store.py."""
    forms = dict.fromkeys(str(entry.form) for entry in getattr(tensor, "mxfp8_entries", ()))
    return " or ".join(forms) or "in the form it then had"


def refuse(tensor: object, name: str, reason: str) -> None:
    """Raises ValueError if a graph would read this tensor although it is released. ``reason``: why it would."""
    if is_released(tensor):
        raise ValueError(
            f"{name} was released (release_quantized=True), and this graph would read it ({reason}): compile it as "
            f"before, {_forms(tensor)}, or load the model again"
        )
