"""What can become of a layer or tensor of a checkpoint, one class each."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..files import TensorFiles
from ..headers import TensorInfo
from ..layer import LayerSource
from . import rounding

QUANTIZED, CONVERTED, DEQUANTIZED, LEFT, COPIED = "quantized", "converted", "dequantized", "left", "copied"
ACTIONS = (QUANTIZED, CONVERTED, DEQUANTIZED, LEFT, COPIED)


class Result(NamedTuple):
    """The tensors that a step makes, and what rounding has cost; None where nothing is rounded."""

    tensors: tuple[Tensor, ...]
    error: rounding.Error | None = None


@dataclass(frozen=True)
class Step(abc.ABC):
    """What becomes of one layer or tensor.

    Attributes:
        name: of the layer, or of a tensor that belongs to none.
        shape: of the weight or tensor.
        inputs: the headers of what is read.
        outputs: the headers of what is written, in a file that is not known yet.
        action: one of ``ACTIONS``; reason: why it is left or dequantized, else "".
    """

    action: ClassVar[str]
    name: str
    shape: tuple[int, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    reason: str = field(default="", kw_only=True)

    @abc.abstractmethod
    def run(self, files: TensorFiles) -> Result:
        """Reads and computes; raises CheckpointError where a file cannot be read."""


@dataclass(frozen=True)
class Copy(Step):
    """A tensor that stays as it is: one of no linear, or of one that is left."""

    action = COPIED

    def run(self, files: TensorFiles) -> Result:
        return Result((files.read(self.inputs[0].name),))


@dataclass(frozen=True)
class Leave(Copy):
    """The weight of a linear that is not quantized, or of something that looks like one."""

    action = LEFT


@dataclass(frozen=True)
class Quantize(Step):
    """A weight ``[N, K]`` that becomes MXFP8 by ``rule``."""

    action = QUANTIZED
    rule: str

    def run(self, files: TensorFiles) -> Result:
        weight, scale, error = rounding.quantized(files.read(self.inputs[0].name), self.rule)
        return Result((weight, scale), error)


@dataclass(frozen=True)
class Convert(Step):
    """An MXFP8 layer that gets other names and another layout of its scales; no code and no scale changes."""

    action = CONVERTED
    source: LayerSource

    def run(self, files: TensorFiles) -> Result:
        return Result(self.source.read_weight(files))


@dataclass(frozen=True)
class Dequantize(Step):
    """An MXFP8 layer that becomes ``dtype``."""

    action = DEQUANTIZED
    source: LayerSource
    dtype: torch.dtype

    def run(self, files: TensorFiles) -> Result:
        dense, error = rounding.dequantized(*self.source.read_weight(files), self.dtype)
        return Result((dense[..., : self.shape[-1]].contiguous(),), error)
