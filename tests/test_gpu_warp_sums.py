"""How warps that stand along K add up their sums, on the CPU: the function as one of Python, and its layout. What it
becomes in kernels is in tests/test_gpu_hopper.py and test_gpu_kernels.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from simulating import GLUON, array, in_python, linear_layout

from mxfp8_ops.gpu import partial_sums, warp_sums

SIZES = pytest.mark.parametrize(
    ("along", "across", "outputs", "rows"),
    [
        (1, 1, 32, 16),
        (4, 1, 32, 32),
        (4, 1, 32, 16),
        (4, 1, 32, 8),
        (8, 1, 16, 8),
        (16, 1, 16, 16),
        (16, 1, 32, 8),
        (4, 2, 32, 32),
        (2, 4, 64, 64),
    ],
)
"""Warps along K and across N, and the tile that they have sums of: ``narrow``, ``vectors`` and ``mma_kernel``."""


@SIZES
def test_the_sums_of_all_warps_are_added_and_stand_where_they_stood(
    monkeypatch: pytest.MonkeyPatch, along: int, across: int, outputs: int, rows: int
) -> None:
    gluon = SimpleNamespace(**GLUON, num_warps=lambda: along * across)
    for module in (partial_sums, warp_sums):
        in_python(monkeypatch, module, gluon)
    total = torch.randint(-1000, 1000, (along, outputs, rows)).float()
    found = warp_sums.sum_of_warps(array(total)).as_subclass(Tensor)
    assert torch.equal(found, total.sum(0))


@SIZES
def test_each_lane_takes_the_same_sums_of_all_warps_and_every_sum_is_taken(
    along: int, across: int, outputs: int, rows: int
) -> None:
    size, warps = outputs * rows, along * across
    layout = warp_sums._in_each_lane.fn(along, size, warps)
    found = linear_layout(layout, [along, size])
    registers, others = found.reg_bases, [*found.lane_bases, *found.warp_bases]
    assert sorted(basis[0] for basis in registers if basis[0]) == [1 << i for i in range(along.bit_length() - 1)]
    assert not any(basis[0] for basis in others)
    taken = {basis[1] for basis in [*registers, *others]} - {0}
    assert taken == {1 << i for i in range(size.bit_length() - 1)}
