"""Weights whose packed bytes were freed (``release_quantized=True``): a shape without data.

Torch crashes on reading freed memory, so a released weight changes its class to one that raises instead.
Compiled graphs, which are guarded on shape, strides, dtype and device, notice nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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


def release(weight: Tensor) -> None:
    """Frees the bytes of ``weight``, in place; other tensors on the same storage keep it alive."""
    empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    empty.untyped_storage().resize_(0)
    weight.data = empty
    weight.__class__ = ReleasedParameter if isinstance(weight, nn.Parameter) else ReleasedTensor


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, 0 once it was released."""
    return 0 if is_released(tensor) else tensor.nbytes
