"""How formats store the scales of a weight ``[..., N, K]``, and the way back to ``[..., N, K/32]``, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from torch import Tensor

from ..format import BLOCK_SIZE

_TILE_ROWS, _TILE_COLUMNS = 128, 4
Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowMajor:
    """``[..., N, ceil(K/32)]``: a row of scales for each row of the weight."""

    def stored_shapes(self, weight: Shape) -> tuple[Shape, ...]:
        """The shapes that a file may give the scales of a ``weight [..., N, K]``."""
        return ((*weight[:-1], ceil(weight[-1] / BLOCK_SIZE)),)

    def to_rows(self, scale: Tensor, weight: Shape) -> Tensor:
        """The scale bytes ``[..., N, ceil(K/32)]`` of a ``weight [..., N, K]`` from uint8 as they are stored."""
        return scale


@dataclass(frozen=True)
class SharedByRows:
    """``[..., ceil(N/rows), K/32]``: ``rows`` rows of the weight share a row of scales, the last ones perhaps fewer."""

    rows: int

    def stored_shapes(self, weight: Shape) -> tuple[Shape, ...]:
        return ((*weight[:-2], ceil(weight[-2] / self.rows), ceil(weight[-1] / BLOCK_SIZE)),)

    def to_rows(self, scale: Tensor, weight: Shape) -> Tensor:
        rows = min(self.rows, weight[-2])  # a config may say any number
        return scale.repeat_interleave(rows, dim=-2).narrow(-2, 0, weight[-2])


@dataclass(frozen=True)
class Swizzled:
    """Tiles of 128 rows by 4 scales, as matrix units of Blackwell read them: within a tile, the scale of row r and
    block b is at ``16 * (r % 32) + 4 * (r // 32) + b``. Rows are padded to 128 and blocks to 4. Files give it the
    padded shape, which does not tell, or 32 by 16 for each tile, or one dimension.

    Source: NVIDIA's cuBLAS documentation, "1D Block Scaling Factors Layout".
    """

    def stored_shapes(self, weight: Shape) -> tuple[Shape, ...]:
        rows, columns = self._padded(weight)
        return tuple((*weight[:-2], *shape) for shape in ((rows, columns), (rows // 4, columns * 4), (rows * columns,)))

    def to_rows(self, scale: Tensor, weight: Shape) -> Tensor:
        rows, columns = self._padded(weight)
        tiles = scale.reshape(*weight[:-2], rows // _TILE_ROWS, columns // _TILE_COLUMNS, 32, 4, 4)
        plain = tiles.transpose(-4, -2).reshape(*weight[:-2], rows, columns)
        return plain[..., : weight[-2], : ceil(weight[-1] / BLOCK_SIZE)]

    @staticmethod
    def _padded(weight: Shape) -> tuple[int, int]:
        blocks = ceil(weight[-1] / BLOCK_SIZE)
        return ceil(weight[-2] / _TILE_ROWS) * _TILE_ROWS, ceil(blocks / _TILE_COLUMNS) * _TILE_COLUMNS


Layout = RowMajor | SharedByRows | Swizzled
