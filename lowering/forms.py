"""What a weight may become when it is loaded: dequantized, or packed for the kernels of GPUs.

A form says what its value is made of, what it looks like, and by which call it replaces ``mxfp8::linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mxfp8_ops import ops, packed, packing
from mxfp8_ops.convert import dequant_bounded

from .graph import is_linear
from .text import dtype_name


@dataclass(frozen=True)
class Dequantized:
    """``dequant(weight, scale, dtype)``: twice the memory or more, and whatever torch does with a dense weight."""

    dtype: torch.dtype

    word, target = "dequantized", "linear"

    def __str__(self) -> str:
        return f"{self.word} to {dtype_name(self.dtype)}"

    def empty(self, weight: Tensor) -> Tensor:
        """A value of this form without data."""
        return weight.new_empty(weight.shape, dtype=self.dtype)

    def make(self, weight: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        """The value, in ``out`` where that is given."""
        return dequant_bounded(weight, scale, self.dtype, out=out)

    def linear(self, n: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What computes ``linear(x, weight, scale, bias)`` from x and the value, and its arguments before the bias."""
        return F.linear, ()


@dataclass(frozen=True)
class Packed:
    """``pack(weight, scale, dtype)``: one byte an element, in the order in which the kernels of GPUs read it for x of
    that dtype.
    """

    dtype: torch.dtype

    word, target = "packed", "mxfp8.linear_packed"

    def __str__(self) -> str:
        return f"{self.word} for {dtype_name(self.dtype)}"

    def empty(self, weight: Tensor) -> Tensor:
        """A value of this form without data."""
        shape = packing.packed_shape(weight.shape[0], weight.shape[1], self.dtype)
        return weight.new_empty(shape, dtype=packing.PACKED_DTYPE)

    def make(self, weight: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        """The value, in ``out`` where that is given."""
        return packing.pack(weight, scale, out, self.dtype)

    def linear(self, n: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What computes ``linear(x, weight, scale, bias)`` from x and the value, and its arguments before the bias."""
        return packed.linear_packed, (n,)


Form: TypeAlias = Dequantized | Packed


@dataclass(frozen=True)
class Wanted:
    """What is to become of static weights.

    Attributes:
        dequantize: whether they are dequantized: the flag.
        pack: whether those that are not dequantized are packed: None for where the device's kernels read them so.
        merge: whether linears on the same x become one: None for on GPUs.
        release: whether to free quantized weights that nothing else in the graph reads.
        nothing: why nothing at all can be made here, "" if it can.
    """

    dequantize: bool
    pack: bool | None = None
    merge: bool | None = None
    release: bool = False
    nothing: str = ""

    def form(self, node: fx.Node, device: torch.device, dtype: torch.dtype) -> Form | None:
        """What the weight of a call is to become, None if it is to stay as it is."""
        if self.dequantize:
            return Dequantized(dtype)
        if not is_linear(node) or dtype == torch.float32:  # for which there is no kernel
            return None
        return Packed(dtype) if (ops.reads_packed(device) if self.pack is None else self.pack) else None

    def merges(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.merge is None else self.merge
