"""``Mxfp8Linear``: a linear layer whose weight stays packed, one byte an element."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import functional
from .format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE, check_pair, scale_bytes

_PACKED_DTYPES = (ELEMENT_DTYPE, SCALE_DTYPE)


class Mxfp8Linear(nn.Module):
    """``nn.Linear`` on an MXFP8 weight: ``mxfp8_ops.linear(x, weight, weight_scale, bias)``.

    Attributes:
        weight: Parameter ``[N, K]`` float8_e4m3fn, frozen.
        weight_scale: buffer ``[N, K/32]`` uint8, E8M0 bytes. The state_dict uses these two names, which are
            those of ModelOpt and compressed-tensors checkpoints, and also loads scales in float8_e8m0fnu.
        bias: Parameter ``[N]`` or None, trainable, in the dtype of the activations.

    ``.to(dtype)``, ``.half()`` and their like convert the bias only: packed bytes move between devices, they
    are never converted numerically.

    Args:
        in_features: K, a multiple of 32.
        out_features: N.
        bias: whether there is one.
        device: of all tensors.
        dtype: of the bias, default torch's default dtype. The weight is all zeros until it is loaded.

    Raises:
        ValueError: in_features is not a positive multiple of 32, or out_features not positive.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features <= 0 or in_features % BLOCK_SIZE or out_features <= 0:
            raise ValueError(
                f"in_features must be a positive multiple of {BLOCK_SIZE} and out_features positive, "
                f"got {in_features} and {out_features}"
            )
        weight = torch.zeros(out_features, in_features, dtype=torch.uint8, device=device).view(ELEMENT_DTYPE)
        scale = torch.zeros(out_features, in_features // BLOCK_SIZE, dtype=SCALE_DTYPE, device=device)
        self._assign(weight, scale, torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    def _assign(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """The one constructor: takes packed tensors ``[N, K]``, ``[N, K/32]`` and ``[N]`` as they are."""
        check_pair(weight, scale)
        super().__init__()
        self.out_features, self.in_features = weight.shape
        frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad  # kept: layers may share it
        self.weight = weight if frozen else nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", scale)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    def from_quantized(cls, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Mxfp8Linear:
        """Wraps a packed weight ``[N, K]`` and its scale ``[N, K/32]`` (uint8 or float8_e8m0fnu), not copied.

        Raises:
            TypeError, ValueError: the two are not one MXFP8 matrix.
        """
        if weight.dim() != 2:
            raise ValueError(f"the weight of a linear must be [N, K], got {list(weight.shape)}")
        module = cls.__new__(cls)
        module._assign(weight, scale_bytes(weight_scale), bias)
        return module

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None, rule: str = "rceil") -> Mxfp8Linear:
        """Quantizes ``weight [N, K]`` (float32, bfloat16 or float16) with ``mxfp8_ops.quantize``."""
        return cls.from_quantized(*functional.quantize(weight.detach(), rule), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rule: str = "rceil") -> Mxfp8Linear:
        """Quantizes the weight of ``linear`` and takes over its bias (the same Parameter) and mode."""
        return cls.from_float(linear.weight, linear.bias, rule).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mxfp8Linear:
        return super()._apply(lambda tensor: _apply_to_bytes(fn, tensor), recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Plain pickle cannot take a float8 tensor: the weight goes as its bytes."""
        parameters = {**self._parameters, "weight": _PickledWeight.of(self.weight)}
        return {**self.__dict__, "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """``copy.copy`` hands over the state as it is, unlike pickle and ``copy.deepcopy``."""
        weight = state["_parameters"]["weight"]
        if isinstance(weight, _PickledWeight):
            state["_parameters"]["weight"] = weight.weight()
        super().__setstate__(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Brings checkpoint tensors to their bytes first: the copy that follows would convert numerically,
        and ``uint8.copy_(float8_e8m0fnu)`` turns bytes 110..126 into 0 without an error.
        """
        local_metadata, *_, error_messages = args
        if not local_metadata.get("assign_to_params_buffers", False):
            self.weight.detach()  # a released weight raises here, before its scale is overwritten
        packed = {}
        for name, dtype in (("weight", ELEMENT_DTYPE), ("weight_scale", SCALE_DTYPE)):
            tensor = state_dict.get(prefix + name)
            if not isinstance(tensor, Tensor):
                continue
            if tensor.dtype not in (dtype, torch.uint8, torch.float8_e8m0fnu) or (
                name == "weight" and tensor.dtype == torch.float8_e8m0fnu
            ):
                error_messages.append(
                    f"{prefix}{name} must hold packed {dtype} bytes, got {tensor.dtype}: "
                    "quantize the checkpoint, or load it before quantize_()"
                )
                return
            packed[prefix + name] = tensor.view(dtype)
        super()._load_from_state_dict({**state_dict, **packed}, prefix, *args)


class _PickledWeight:
    """Stands for a Parameter in a module's state. One for each Parameter, so that pickle's memo keeps a weight
    shared that several layers share.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = ref(weight)

    @classmethod
    def of(cls, weight: Tensor) -> object:
        if weight.dtype != ELEMENT_DTYPE:
            return weight
        return _pickled.setdefault(weight, cls(weight))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.weight(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        weight = self.weight()
        assert weight is not None  # the module that is being pickled holds it
        return _unpickle_weight, (weight.detach().view(torch.uint8),)


_pickled = WeakIdKeyDictionary()


def _unpickle_weight(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data.view(ELEMENT_DTYPE), requires_grad=False)


def _apply_to_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn`` on the bytes of a packed tensor: a move is kept, a conversion to another dtype undone."""
    if tensor.dtype not in _PACKED_DTYPES:
        return fn(tensor)
    data = tensor.view(torch.uint8)
    moved = fn(data)
    if moved.dtype != torch.uint8:
        moved = data.to(moved.device)
    return moved.view(tensor.dtype)
