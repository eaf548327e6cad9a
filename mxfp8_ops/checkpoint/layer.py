"""One MXFP8 layer of a checkpoint: which tensors hold it, and reading them in the form of this package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE
from .errors import CheckpointError
from .files import TensorFiles
from .headers import TensorInfo
from .layouts import Layout, RowMajor
from .values import EVERYTHING

ELEMENT, SCALE = "F8_E4M3", "F8_E8M0"
SHORT_FLOATS = ("F8_", "F6_", "F4")
"""Beginnings of the dtypes whose values mean nothing without scales."""
_FLOATS = ("F32", "BF16", "F16")


class Mxfp8Weight(NamedTuple):
    """A layer as the operators of this package take it.

    Attributes:
        weight: ``[..., N, K]`` float8_e4m3fn; K filled up with zeros to a multiple of 32.
        scale: ``[..., N, K/32]`` uint8, E8M0 bytes, row-major.
        bias: ``[N]`` as it is stored, or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LayerSource:
    """Where a layer lies in the files.

    Attributes:
        name: dotted path of the module; of experts in one tensor, of the parameter.
        weight, scale, bias: their headers.
        layout: of the scales.
        scale_dtypes: the dtypes in which this format stores E8M0 bytes.
    """

    name: str
    weight: TensorInfo
    scale: TensorInfo
    bias: TensorInfo | None = None
    layout: Layout = field(default_factory=RowMajor)
    scale_dtypes: tuple[str, ...] = ("U8",)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., N, K)`` as it is stored: K may be no multiple of 32."""
        return self.weight.shape

    @property
    def parameter(self) -> str:
        """The name of the weight in a model: the module's ``.weight``, or of experts in one tensor the name itself."""
        return f"{self.name}.weight" if self.weight.name.startswith(f"{self.name}.") else self.name

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its tensors."""
        return tuple(each.name for each in (self.weight, self.scale, self.bias) if each is not None)

    @property
    def nbytes(self) -> int:
        """Of weight and scale."""
        return self.weight.nbytes + self.scale.nbytes

    def check(self) -> None:
        """Raises CheckpointError unless dtypes and shapes are those of an MXFP8 layer."""
        if self.weight.dtype != ELEMENT:
            raise CheckpointError(f"{self.weight} has a scale, {self.scale}, but its elements are not {ELEMENT}")
        if len(self.shape) < 2 or 0 in self.shape:
            raise CheckpointError(f"{self.weight}: the weight of a linear must be [..., N, K], none of them 0")
        if self.scale.dtype not in self.scale_dtypes:
            raise CheckpointError(
                f"{self.scale} must be E8M0 bytes, as {' or '.join(self.scale_dtypes)}, for {self.weight}"
                + (": float scales are another format" if self.scale.dtype in _FLOATS else "")
            )
        allowed = self.layout.stored_shapes(self.shape)
        if self.scale.shape not in allowed:
            expected = " or ".join(str(list(shape)) for shape in allowed)
            raise CheckpointError(f"{self.scale} must be {expected} for {self.weight} ({self.layout})")
        rows = (*self.shape[:-2], self.shape[-2])
        if self.bias is not None and (self.bias.shape != rows or self.bias.dtype not in _FLOATS):
            raise CheckpointError(f"{self.bias} must be {' or '.join(_FLOATS)} {list(rows)} for {self.weight}")

    def read(self, files: TensorFiles) -> Mxfp8Weight:
        """The whole layer; see ``read_weight``."""
        return Mxfp8Weight(*self.read_weight(files), None if self.bias is None else files.read(self.bias.name))

    def read_weight(
        self, files: TensorFiles, rows: slice = EVERYTHING, columns: slice = EVERYTHING
    ) -> tuple[Tensor, Tensor]:
        """Weight and scale, or the part of them in ``rows`` of N and ``columns`` of K, whole blocks of 32.

        Raises:
            CheckpointError: the file cannot be read, or all scales of a matrix are 0 although elements are not.
        """
        weight = files.read(self.weight.name, rows, columns).view(torch.uint8)
        scale = self.layout.to_rows(files.read(self.scale.name).view(SCALE_DTYPE), self.shape)
        if never_written(weight, scale):
            raise CheckpointError(f"{self.scale}: all scales are 0 although {self.weight.name} is not: never written?")
        return whole_blocks(weight).view(ELEMENT_DTYPE), scale[..., rows, _blocks(columns)].contiguous()


def never_written(weight: Tensor, scale: Tensor) -> bool:
    """Whether all scales of a matrix of ``weight [..., N, K]`` are 0 although its elements are not; both are uint8."""
    unscaled = scale.flatten(-2).amax(-1) == 0  # of each expert
    return bool(unscaled.any() and ((weight[unscaled] & 0x7F) != 0).any())


def whole_blocks(weight: Tensor) -> Tensor:
    """``weight [..., K]`` uint8 with zeros up to the next K that is a multiple of 32; itself where K is one."""
    missing = -weight.shape[-1] % BLOCK_SIZE
    return torch.nn.functional.pad(weight, (0, missing)) if missing else weight


def _blocks(columns: slice) -> slice:
    if columns == EVERYTHING:
        return columns
    assert columns.start % BLOCK_SIZE == 0
    assert columns.stop % BLOCK_SIZE == 0
    return slice(columns.start // BLOCK_SIZE, columns.stop // BLOCK_SIZE)
