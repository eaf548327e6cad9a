"""The operators on packed weights as torch sees them: ``mxfp8::pack``, ``unpack`` and ``linear_packed``.

Packing is a load-time transformation for the GPU kernels (see ``packing`` for the layout); elsewhere a packed weight
is unpacked in every call. Registration follows ``ops``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import derivatives, ops, packing, reference
from .format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE, check_bias, check_compute_dtype, check_pair
from .gpu import replay
from .ops import _TAGS, _library
from .packing import PACKED_DTYPE, check_packed, check_packed_for, packed_shape

_library.define("pack(Tensor weight, Tensor scale, ScalarType dtype=bfloat16) -> Tensor", tags=_TAGS)
_library.define("unpack(Tensor packed, SymInt n, SymInt k) -> (Tensor, Tensor)", tags=_TAGS)
_library.define("linear_packed(Tensor x, Tensor packed, SymInt n, Tensor? bias) -> Tensor", tags=_TAGS)

pack = torch.ops.mxfp8.pack.default
unpack = torch.ops.mxfp8.unpack.default
linear_packed = torch.ops.mxfp8.linear_packed.default


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_pack(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    if weight.dim() != 2:
        raise ValueError(f"only the weight [N, K] of a linear can be packed, got {list(weight.shape)}")
    check_pair(weight, scale)
    check_packed_for(dtype)


def _check_linear_packed(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> None:
    check_compute_dtype(x.dtype, "x")
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a scalar")
    check_packed(packed, n, x.shape[-1])
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device}, the packed weight on {packed.device}: move them to one device")
    check_bias(bias, x, n)


# --- kernels ----------------------------------------------------------------------------------------------------------


def _pack_kernel(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    _check_pack(weight, scale, dtype)
    return packing.pack(weight, scale, dtype=dtype)


def _unpack_kernel(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    check_packed(packed, n, k)
    return packing.unpack(packed, n, k)


def _linear_packed_kernel(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    _check_linear_packed(x, packed, n, bias)
    return reference.linear(x, *packing.unpack(packed, n, x.shape[-1]), bias)


def _linear_packed_cuda(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    out = replay.again("linear_packed", (x, packed, bias), n)
    if out is not None:
        return out
    _check_linear_packed(x, packed, n, bias)
    kernels = ops._gpu()
    if kernels is None:
        return reference.linear(x, *packing.unpack(packed, n, x.shape[-1]), bias)
    return replay.learn("linear_packed", (x, packed, bias), n, lambda: kernels.linear_packed(x, packed, n, bias))


_library.impl("pack", _pack_kernel, "CompositeExplicitAutograd")
_library.impl("unpack", _unpack_kernel, "CompositeExplicitAutograd")
_library.impl("linear_packed", _linear_packed_kernel, "CompositeExplicitAutograd")
_library.impl("linear_packed", _linear_packed_cuda, "CUDA")


# --- fakes ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("mxfp8::pack", lib=_library)
def _pack_fake(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    _check_pack(weight, scale, dtype)
    return weight.new_empty(packed_shape(weight.shape[0], weight.shape[1], dtype), dtype=PACKED_DTYPE)


@torch.library.register_fake("mxfp8::unpack", lib=_library)
def _unpack_fake(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    check_packed(packed, n, k)
    scale = packed.new_empty((n, k // BLOCK_SIZE), dtype=SCALE_DTYPE)
    return packed.new_empty((n, k), dtype=ELEMENT_DTYPE), scale


@torch.library.register_fake("mxfp8::linear_packed", lib=_library)
def _linear_packed_fake(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    _check_linear_packed(x, packed, n, bias)
    return x.new_empty((*x.shape[:-1], n))


# --- autograd, autocast; other transforms go through the canonical weight ---------------------------------------------


def _pack_autograd(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    derivatives.check_frozen(weight)
    with torch._C._AutoDispatchBelowAutograd():
        return pack(weight, scale, dtype)


def _unpack_autograd(packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return unpack(packed, n, k)


class _LinearPacked(torch.autograd.Function):
    """Keeps the packed weight until the backward pass, not an unpacked copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = n, x.shape[-1]
        with torch._C._AutoDispatchBelowAutograd():
            return linear_packed(x, packed, n, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derivatives.gradients(ctx, grad, lambda: unpack(*ctx.saved_tensors, *ctx.shape))


def _linear_packed_autograd(keys: Any, x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    if forward_ad._current_level >= 0:
        return _linear_unpacked(x, packed, n, bias)
    if derivatives.needs_derivative(x, bias):
        _check_linear_packed(x, packed, n, bias)
        return _LinearPacked.apply(x, packed, n, bias)
    out = replay.again("linear_packed", (x, packed, bias), n) if derivatives.goes_on_to_cuda(keys) else None
    if out is not None:
        return out
    with torch._C._AutoDispatchBelowAutograd():
        return linear_packed(x, packed, n, bias)


def _linear_unpacked(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    _check_linear_packed(x, packed, n, bias)
    return ops.linear(x, *unpack(packed, n, x.shape[-1]), bias)


def _linear_packed_autocast(device: str, key: str, x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Any:
    return derivatives.under_autocast(device, key, linear_packed, x, bias, lambda x, bias: (x, packed, n, bias))


_library.impl("pack", _pack_autograd, "Autograd")
_library.impl("unpack", _unpack_autograd, "Autograd")
_library.impl("linear_packed", _linear_packed_autograd, "Autograd", with_keyset=True)
_library.impl("linear_packed", _linear_unpacked, "FuncTorchDynamicLayerFrontMode")
for _device, _key in derivatives.AUTOCAST_KEYS:
    _library.impl("linear_packed", functools.partial(_linear_packed_autocast, _device, _key), _key)
