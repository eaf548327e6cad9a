"""``Mxfp8Linear``: a linear layer whose weight stays MXFP8, one byte an element; packed for GPUs on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE, check_pair, scale_bytes
from .memory import in_large_pages
from .packing import PACKED_DTYPE, check_packed_for, packed_for
from .pickling import PickledPacked, PickledWeight

_DTYPES_OF_BYTES = (ELEMENT_DTYPE, SCALE_DTYPE, PACKED_DTYPE)


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
        codes = in_large_pages(torch.empty(out_features, in_features, dtype=torch.uint8, device=device)).zero_()
        scale = torch.zeros(out_features, in_features // BLOCK_SIZE, dtype=SCALE_DTYPE, device=device)
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self._assign(codes.view(ELEMENT_DTYPE), scale, values)

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

    def pack_(self, dtype: torch.dtype | None = None) -> Mxfp8Linear:
        """Brings the weight into the order in which GPUs read it fastest (see ``mxfp8_ops.pack``), in place: weight
        and scale are freed. Layers that share a weight get a copy each; ``mxfp8_ops.pack_(model)`` keeps it shared.

        The layer computes the same linear. Its state_dict stays canonical: ``weight`` and ``weight_scale``, bit for
        bit, to save and to load, and what is loaded is packed. Its class is ``PackedMxfp8Linear`` until ``unpack_``.

        Args:
            dtype: of the x that it will mostly get, bfloat16 or float16 (see ``mxfp8_ops.pack``). Unless told, float16
                if that is the bias's.

        Returns:
            The layer itself; one that is packed so already stays as it is.

        Raises:
            TypeError: a subclass, whose methods may want the canonical weight. ValueError: the weight wants a gradient
            or was released, or another ``dtype``. The layer is left untouched.
        """
        if type(self) is not Mxfp8Linear:
            raise TypeError(f"{type(self).__name__} is a subclass of Mxfp8Linear and cannot be packed in place")
        dtype = self._packed_for() if dtype is None else dtype
        self._hold_packed(frozen_parameter(functional.pack(self.weight, self.weight_scale, dtype)))
        return self

    def _packed_for(self) -> torch.dtype:
        return torch.float16 if self.bias is not None and self.bias.dtype == torch.float16 else torch.bfloat16

    def unpack_(self) -> Mxfp8Linear:
        """Undoes ``pack_``, in place and bit for bit. A layer that is not packed stays as it is."""
        return self

    def quantized(self) -> tuple[Tensor, Tensor]:
        """``weight [N, K]`` and ``weight_scale [N, K/32]``: the layer's own, or copies where the layer is packed."""
        return self.weight, self.weight_scale

    def _held(self) -> tuple[Tensor, ...]:
        """The tensors that hold the weight now, never copies."""
        return self.weight, self.weight_scale

    def _hold_packed(self, packed: nn.Parameter) -> None:
        # New dicts: a copy made by copy.copy may share the old ones.
        parameters = {"weight_packed": packed, **self._parameters}
        self._parameters = _without(parameters, "weight", "weight_scale")
        self._buffers = _without(self._buffers, "weight_scale")
        self.__class__ = PackedMxfp8Linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mxfp8Linear:
        return super()._apply(lambda tensor: _apply_to_bytes(fn, tensor), recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Plain pickle cannot take a float8 tensor: the weight goes as its bytes."""
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": PickledWeight.of(self.weight)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """``copy.copy`` hands over the state as it is, unlike pickle and ``copy.deepcopy``."""
        state["_parameters"] = {
            name: value.parameter() if isinstance(value, PickledWeight) else value
            for name, value in state["_parameters"].items()
        }
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


class PackedMxfp8Linear(Mxfp8Linear):
    """What an ``Mxfp8Linear`` is between ``pack_`` and ``unpack_``; not to be made otherwise.

    Attributes:
        weight_packed: Parameter, int32, frozen: the weight as ``mxfp8_ops.pack`` makes it. The only tensor beside
            the bias, so ``parameters()`` has it instead of ``weight``; the state_dict has not.
        weight: an unpacked copy ``[N, K]``, made at every read, for code that asks for its dtype, device or values.
            What is written into it does not reach the layer; to assign another weight is an error.
        weight_scale: the same of the scale, ``[N, K/32]``.
    """

    weight_packed: nn.Parameter

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.quantized()[0]

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]
        return self.quantized()[1]

    def quantized(self) -> tuple[Tensor, Tensor]:
        return functional.unpack(self.weight_packed.detach(), self.out_features, self.in_features)

    def _held(self) -> tuple[Tensor, ...]:
        return (self.weight_packed,)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear_packed(x, self.weight_packed, self.out_features, self.bias)

    def pack_(self, dtype: torch.dtype | None = None) -> Mxfp8Linear:
        if dtype is not None and dtype != self._packed_for():
            check_packed_for(dtype)
            self.unpack_().pack_(dtype)
        return self

    def _packed_for(self) -> torch.dtype:
        return packed_for(self.weight_packed)

    def unpack_(self) -> Mxfp8Linear:
        weight, scale = self.quantized()
        self._parameters = _without({"weight": frozen_parameter(weight), **self._parameters}, "weight_packed")
        self._buffers = {"weight_scale": scale, **self._buffers}
        self.__class__ = Mxfp8Linear  # type: ignore[assignment]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "weight_scale"):
            raise AttributeError(f"{name} of a packed Mxfp8Linear cannot be replaced: call unpack_() first")
        super().__setattr__(name, value)

    def _get_name(self) -> str:
        return "Mxfp8Linear"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed={str(self._packed_for()).removeprefix('torch.')}"

    def __getstate__(self) -> dict[str, Any]:
        packed = PickledPacked.of_layer(self.weight_packed, self.out_features, self.in_features)
        return {**self.__dict__, "_parameters": {**self._parameters, "weight_packed": packed}}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight, scale = self.quantized()
        destination[prefix + "weight"] = frozen_parameter(weight) if keep_vars else weight
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight_packed"]
        destination[prefix + "weight_scale"] = scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads as the unpacked layer does, then packs: in place, so that layers still share the weight and compiled
        graphs see the new one, or as a new Parameter under ``assign``.
        """
        packed, dtype, local_metadata = self.weight_packed, self._packed_for(), args[0]
        self.unpack_()
        try:
            self._load_from_state_dict(state_dict, prefix, *args)  # now that of Mxfp8Linear
        finally:
            loaded = functional.pack(self.weight, self.weight_scale, dtype)
            if local_metadata.get("assign_to_params_buffers", False):
                packed = frozen_parameter(loaded)
            else:
                with torch.no_grad():
                    packed.copy_(loaded)
            self._hold_packed(packed)


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """``tensor`` as a Parameter without a gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def _without(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _apply_to_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn`` on the bytes of a packed tensor: a move is kept, a conversion to another dtype undone."""
    if tensor.dtype not in _DTYPES_OF_BYTES:
        return fn(tensor)
    data = tensor.view(torch.uint8)
    moved = fn(data)
    if moved.dtype != torch.uint8:
        moved = data.to(moved.device)
    return moved.view(tensor.dtype)
