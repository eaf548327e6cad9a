"""Quantizing and dequantizing whole weights in chunks of rows, and how far the results are from what they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import functional
from ...format import BLOCK_SIZE, ELEMENT_DTYPE, SCALE_DTYPE

_CHUNK_ELEMENTS = 1 << 18
_RELATIVE = {"rceil": 2.0**-4, "floor": 2.0**-3}  # half the distance of normal elements; "floor" takes 512 to 448
_SUBNORMAL = 2.0**-10 / 224  # that of subnormal ones, of a block's largest element: scales are below amax / 224
_SMALLEST = 224 * 2.0**-127  # amax for which no smaller scale exists


@dataclass
class Error:
    """What rounding has done to a weight, over all elements that are finite before and after.

    Attributes:
        signal: sum of squares of the weight, in float64.
        noise: sum of squares of the differences.
        not_finite: elements that are inf or NaN in the result.
    """

    signal: float = 0.0
    noise: float = 0.0
    not_finite: int = 0

    @property
    def decibels(self) -> float | None:
        """The signal-to-noise ratio in dB; None where no element has changed."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """Counts ``rounded`` for ``exact``, of one shape."""
        exact, rounded = exact.double(), rounded.double()
        difference = exact - rounded
        noise = _square(difference)
        if not math.isfinite(noise):  # rare, so that nobody pays for looking
            self.not_finite += int((~rounded.isfinite()).sum())
            finite = exact.isfinite() & rounded.isfinite()
            exact, difference = exact.where(finite, 0), difference.where(finite, 0)
            noise = _square(difference)
        self.signal += _square(exact)
        self.noise += noise


def _square(values: Tensor) -> float:
    flat = values.flatten()
    return torch.dot(flat, flat).item()


def quantized(weight: Tensor, rule: str) -> tuple[Tensor, Tensor, Error]:
    """``mxfp8_ops.quantize`` of ``weight [N, K]``, and the error that it makes; memory beyond the result is bounded."""
    codes = torch.empty(weight.shape, dtype=SCALE_DTYPE)
    scales = torch.empty((weight.shape[0], weight.shape[1] // BLOCK_SIZE), dtype=SCALE_DTYPE)
    error = Error()
    for rows in _chunks(weight):
        part, scale = functional.quantize(weight[rows], rule)
        codes[rows], scales[rows] = part.view(SCALE_DTYPE), scale
        error.add(weight[rows], functional.dequant(part, scale, torch.float32))
    return codes.view(ELEMENT_DTYPE), scales, error


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Error]:
    """``mxfp8_ops.dequant`` of ``weight [..., N, K]``, and what rounding to ``dtype`` has lost; memory as above."""
    dense = torch.empty(weight.shape, dtype=dtype)
    flat, parts, scales = dense.view(-1, dense.shape[-1]), weight.flatten(0, -2), scale.flatten(0, -2)
    error = Error()
    for rows in _chunks(flat):
        flat[rows] = functional.dequant(parts[rows], scales[rows], dtype)
        error.add(functional.dequant(parts[rows], scales[rows], torch.float32), flat[rows])
    return dense, error


def beyond(weight: Tensor, codes: Tensor, scale: Tensor, rule: str) -> int:
    """How many elements of ``weight [N, K]`` are further from those of its MXFP8 form than half the distance of two
    values that it can have there by ``rule``. Elements that are not finite in float32 do not count.
    """
    count = 0
    for rows in _chunks(weight):
        exact = weight[rows].double().unflatten(-1, (-1, BLOCK_SIZE))
        rounded = functional.dequant(codes[rows], scale[rows], torch.float32).unflatten(-1, (-1, BLOCK_SIZE))
        largest = exact.abs().amax(-1, keepdim=True)
        allowed = (exact.abs() * _RELATIVE[rule]).maximum(largest.clamp(min=_SMALLEST) * _SUBNORMAL)
        count += int((((exact - rounded).abs() > allowed) & rounded.isfinite()).sum())
    return count


def _chunks(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[-1])
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))
