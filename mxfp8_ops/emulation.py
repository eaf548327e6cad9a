"""The vLLM-shaped kernel class: MXFP8 linear layers in software, chosen and driven by a model loader.

The loader makes a layer with ``weight [N, K]`` and ``weight_scale``, calls
``process_weights_after_loading`` once, then ``apply_weights`` for every forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, settings
from .convert import dequant_bounded
from .format import BLOCK_SIZE, SCALE_DTYPE, check_pair, scale_bytes


@dataclass(frozen=True)
class Mxfp8LinearLayerConfig:
    """What a kernel may decide by: ``weight_shape`` is ``(N, K)``."""

    weight_shape: tuple[int, int]


class Mxfp8LinearKernel(ABC):
    """One way to run MXFP8 linear layers."""

    def __init__(self, config: Mxfp8LinearLayerConfig) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Whether this machine can run the kernel, else why not."""

    @classmethod
    @abstractmethod
    def can_implement(cls, c: Mxfp8LinearLayerConfig) -> tuple[bool, str | None]:
        """Whether the kernel can run this layer, else why not."""

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Brings freshly loaded parameters into the form that ``apply_weights`` wants."""

    @abstractmethod
    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear: ``x [..., K]`` to ``[..., N]`` in x's dtype."""


class EmulationMxfp8LinearKernel(Mxfp8LinearKernel):
    """Runs everywhere: dequantizes once at load (flag on or unset), else in every call (flag off).

    Args:
        config: of the layer.
        dequant_at_load: beats ``MXFP8_DEQUANT_AT_LOAD`` unless None.
    """

    def __init__(self, config: Mxfp8LinearLayerConfig, dequant_at_load: bool | None = None) -> None:
        super().__init__(config)
        self._dequant_at_load = dequant_at_load

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Mxfp8LinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Trims a padded ``weight_scale`` to ``[:N, :K/32]``, makes both tensors contiguous, and unless the
        flag is off replaces ``weight`` by its bfloat16 values. Safe to call twice.

        Raises:
            TypeError, ValueError: weight and scale are not one MXFP8 matrix; the layer is left untouched.
        """
        if _is_dense(layer.weight):
            return
        weight = layer.weight.detach()
        if weight.dim() != 2:
            raise ValueError(f"the weight of a linear must be [N, K], got {list(weight.shape)}")
        n, k = weight.shape
        scale = scale_bytes(layer.weight_scale.detach())
        scale = scale[:n, : k // BLOCK_SIZE] if scale.dim() == 2 else scale
        check_pair(weight, scale)
        if settings.dequant_at_load(self._dequant_at_load) is not False:
            weight = dequant_bounded(weight, scale, torch.bfloat16)
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        scale_parameter = nn.Parameter(scale.contiguous(), requires_grad=False)
        if "weight_scale" in layer._buffers:
            del layer.weight_scale
        layer.weight_scale = scale_parameter

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """A plain linear on a weight of two bytes or more (cast to x's dtype), else the packed linear.

        Raises:
            ValueError: the scale is not uint8, or not 2-D: process_weights_after_loading was not called.
        """
        weight = layer.weight
        if _is_dense(weight):
            return F.linear(x, weight.to(x.dtype), bias)
        scale = layer.weight_scale
        if scale.dtype != SCALE_DTYPE:
            raise ValueError(
                f"weight_scale must be uint8 E8M0 bytes, got {scale.dtype}: "
                "call process_weights_after_loading(layer) first"
            )
        if scale.dim() != 2:
            raise ValueError(
                f"weight_scale must be 2-D [N, K/{BLOCK_SIZE}], got {scale.dim()}-D {list(scale.shape)}: "
                "call process_weights_after_loading(layer) first"
            )
        return functional.linear(x, weight, scale, bias)


def _is_dense(weight: Tensor) -> bool:
    return weight.element_size() >= 2
