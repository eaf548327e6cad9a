"""For tests of plans: chips, forms and sizes, and what a plan computes at once. Only where Triton can be imported."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from mxfp8_ops.gpu.kinds_few import Direct, Narrow, Vectors
from mxfp8_ops.gpu.plans import Plan, Skinny, Wide

CHIP = pytest.mark.parametrize("processors", [78, 114, 132])
FORM = pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
EDGES = (1, 4, 5, 8, 9, 16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 96, 97, 128, 129, 160, 161, 192, 193)
EDGES += (255, 256, 257, 300, 384, 385, 1000, 2048, 3072, 4097, 16384)
"""Rows of x about which something changes, and some others."""
N = (1, 7, 288, 1024, 4097, 14336, 28672, 151936)
K = {True: (32, 96, 128, 384, 4096, 28672), False: (128, 256, 384, 4096, 28672)}
"""By form: packed or canonical."""
PARTIAL = 256 * 2**20
"""Bytes that the sums of parts may take."""


def columns(chosen: Plan) -> int:
    """Outputs of a tile."""
    if isinstance(chosen, Direct | Narrow):
        return 8 if isinstance(chosen, Direct) else 32
    if isinstance(chosen, Vectors):
        return chosen.outputs
    return 64 * chosen.across if isinstance(chosen, Skinny) else 128


def tiles_of(chosen: Plan, m: int, n: int) -> int:
    return math.ceil(m / chosen.rows) * math.ceil(n / columns(chosen))


def check_each_block_once(parts: Iterable[tuple[int, int, int]], tiles: int, blocks: int) -> None:
    """That parts of tiles, of each its tile, its first block and how many it has, are all blocks of all tiles, once."""
    done = 0
    for tile, first, count in sorted(parts):
        assert 0 <= first < first + count <= blocks
        assert tile * blocks + first == done
        done += count
    assert done == tiles * blocks


def split_of(chosen: Plan, m: int, n: int) -> int:
    """How many tiles are computed in parts."""
    if isinstance(chosen, Wide):
        return chosen.shared
    return tiles_of(chosen, m, n) if isinstance(chosen, Skinny) and chosen.parts > 1 else 0
