"""The order of scales that block-scaled matrix units read: tiles of 128 rows by 4 columns, 32_4_4 within."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swizzled(scale: Tensor) -> Tensor:
    """uint8 ``[N, C]`` to uint8 ``[512 * ceil(N/128) * ceil(C/4)]``, short tiles filled up with zeros.

    Row r and column c of a tile go to ``(r % 32) * 16 + (r // 32) * 4 + c``; tiles follow each other along the
    columns first.
    """
    n, columns = scale.shape
    tiles = F.pad(scale, (0, -columns % 4, 0, -n % 128)).unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))
    return tiles.permute(0, 3, 2, 1, 4).flatten()
