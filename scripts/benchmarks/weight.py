"""A weight in every form that is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mxfp8_ops
from mxfp8_ops.memory import in_large_pages

from .case import packed_for
from .options import Shape


@dataclass(frozen=True)
class Weight:
    """``dense [N, K]`` as it was, canonical ``(weight, scale)``, packed where the device has that, and dequantized.
    ``stored``: the bytes of the packed weight, or of the canonical one, in one piece.
    """

    dense: Tensor
    canonical: tuple[Tensor, Tensor]
    packed: Tensor | None
    folded: Tensor
    stored: Tensor

    def linear_packed(self, x: Tensor) -> Tensor:
        assert self.packed is not None
        return mxfp8_ops.linear_packed(x, self.packed, len(self.dense))


def random_weight(shape: Shape, dtype: torch.dtype, place: str, packs: bool) -> Weight:
    """A weight for x of ``dtype``, packed if asked for."""
    dense = random_dense(shape, dtype, place)
    canonical = mxfp8_ops.quantize(dense)
    folded = mxfp8_ops.dequant(*canonical, dtype)
    if packs:
        packed = mxfp8_ops.pack(*canonical, packed_for(dtype))
        return Weight(dense, canonical, packed, folded, packed)
    weight, scale = canonical
    parts = [weight.view(torch.uint8).flatten(), scale.flatten()]
    stored = in_large_pages(torch.empty(sum(map(len, parts)), dtype=torch.uint8, device=place))  # as quantize's results
    torch.cat(parts, out=stored)
    weight, scale = stored[: weight.numel()], stored[weight.numel() :]
    canonical = weight.view(torch.float8_e4m3fn).view(shape), scale.view(shape[0], -1)
    return Weight(dense, canonical, None, folded, stored.view(torch.int32))


def random_dense(shape: Shape, dtype: torch.dtype, place: str) -> Tensor:
    """As layers are initialized: products of K elements have about the size of x."""
    return torch.randn(shape, dtype=dtype, device=place).mul_(shape[1] ** -0.5)
