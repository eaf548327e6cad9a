"""Where the items of a tensor are, in Gluon: their numbers along one of many dimensions."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def places_along(size: gl.constexpr, dim: gl.constexpr, rank: gl.constexpr, LAYOUT: gl.constexpr):
    """0 .. size - 1 along one dimension of a tensor of that rank and layout."""
    places = gl.arange(0, size, _along(dim, rank, LAYOUT))
    for other in gl.static_range(rank):
        if other != dim:
            places = gl.expand_dims(places, other)
    return places


@gluon.constexpr_function
def _along(dim, rank, layout):
    for other in reversed(range(rank)):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout
