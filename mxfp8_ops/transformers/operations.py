"""What happens to a weight between the file and the model, as operations of transformers' loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from .. import functional
from ..checkpoint.layer import never_written, whole_blocks
from ..convert import dequant_bounded
from ..format import ELEMENT_DTYPE, scale_bytes
from ..nn import frozen_parameter
from .plan import Plan

Tensors = dict[str, Any]  # a tensor, or a list of them


class _Operation(ConversionOps):
    """Shared by all the copies that the loader makes, one for each weight, so that ``plan`` hears of every one."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return self

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("weights are saved from the state_dict, not by the operations that loaded them")


class _FromCheckpoint(_Operation):
    """Of a converter whose sources are weights and, with "_scale" behind their names, scales."""

    def _dense(self, name: str, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """``[..., N, K]`` in ``dtype``, K whole blocks or not."""
        rows, padded = self._rows(name, weight, scale), whole_blocks(weight.view(torch.uint8)).view(ELEMENT_DTYPE)
        return dequant_bounded(padded, rows, dtype)[..., : weight.shape[-1]].contiguous()

    def _rows(self, name: str, weight: Tensor, scale: Tensor) -> Tensor:
        """Scale bytes ``[..., N, ceil(K/32)]``. Notes what only the values show."""
        self.plan.loaded.add(name)
        stored = scale_bytes(scale)
        if never_written(weight.view(torch.uint8), stored):
            self.plan.problems.append(f"all scales of {name} are 0 although its elements are not: never written?")
        layout = self.plan.kept.get(name) or self.plan.dense[name]
        return layout.to_rows(stored, tuple(weight.shape)).contiguous()


class Load(_FromCheckpoint):
    """Hands on one weight of a checkpoint: with scales, the weight and ``<name>_scale [N, K/32]`` uint8 where the plan
    keeps it, else dequantized to the dtype of its parameter; without scales as it is.
    """

    @torch.no_grad()
    def convert(self, input_dict: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        name = kwargs["full_layer_name"]
        ((_, weights, scales),) = _pairs(input_dict)
        if not scales:
            return {name: weights}
        ((weight, scale),) = zip(weights, scales, strict=True)
        if name in self.plan.kept:
            return {name: frozen_parameter(weight), f"{name}_scale": self._rows(name, weight, scale)}
        return {name: self._dense(name, weight, scale, kwargs["model"].get_parameter(name).dtype)}


class Dequantize(_FromCheckpoint):
    """The first of the operations that make a parameter of several tensors, such as experts: hands on dequantized
    weights, in the dtype of the parameter, and weights without scales as they are.
    """

    @torch.no_grad()
    def convert(self, input_dict: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        name = kwargs["full_layer_name"]
        dtype = kwargs["model"].get_parameter(name).dtype
        dense = {}
        for key, weights, scales in _pairs(input_dict):
            if scales:
                weights = [self._dense(name, *pair, dtype) for pair in zip(weights, scales, strict=True)]
            dense[key] = weights
        return dense


class Quantize(_Operation):
    """Takes float weights ``[N, K]`` in the model's dtype. Hands on what ``mxfp8_ops.quantize`` makes of them, the
    weight and ``<name>_scale``, or where the plan wants it dense what these stand for, in the same dtype.
    """

    def __init__(self, plan: Plan, rule: str) -> None:
        super().__init__(plan)
        self.rule = rule

    @torch.no_grad()
    def convert(self, input_dict: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        made: Tensors = {}
        for name, value in input_dict.items():
            made |= self._quantized(name, *_listed(value)) if name in self.plan else {name: value}
        return made

    def _quantized(self, name: str, tensor: Tensor) -> Tensors:
        self.plan.loaded.add(name)
        weight, scale = functional.quantize(tensor, self.rule)
        if name in self.plan.dense:
            return {name: dequant_bounded(weight, scale, tensor.dtype)}
        return {name: frozen_parameter(weight), f"{name}_scale": scale}


def is_bytes(tensor: Any) -> bool:
    """Whether a tensor, or a part of a file that stands for one, has elements of one byte, which no cast may touch."""
    if hasattr(tensor, "get_dtype"):
        return tensor.get_dtype() in ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")
    return tensor.dtype.itemsize == 1


def _pairs(tensors: Tensors) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Patterns of weights, with what they matched and the scales of it, none where there are none."""
    plain = {key.removesuffix("$"): _listed(value) for key, value in tensors.items()}
    for key in tensors:
        name = key.removesuffix("$")
        if not name.endswith("_scale"):
            yield key, plain[name], plain.get(f"{name}_scale", [])


def _listed(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]
