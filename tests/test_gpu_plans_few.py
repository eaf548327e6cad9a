"""Kinds of the kernels for few rows of x, and the model of their time."""

from __future__ import annotations

import math

import pytest

from mxfp8_ops.gpu import plans
from mxfp8_ops.gpu.costs_few import Cost, microseconds
from mxfp8_ops.gpu.kinds_few import Direct, Few, Narrow
from mxfp8_ops.gpu.plans_few import EIGHT, FOUR, NARROW, ROW, directs, narrows, single_rows

COSTS = plans.FEW


@pytest.mark.parametrize(("kinds", "rows"), [(FOUR, (1, 2, 3, 4)), (EIGHT, (5, 6, 7, 8))], ids=["four", "eight"])
def test_kinds_are_offered_if_three_quarters_of_their_warps_have_work(
    kinds: dict[Direct, Cost], rows: tuple[int, ...]
) -> None:
    taken = {kind: kind.warps * kind.blocks for kind in kinds}
    least = min(taken.values())
    for m in rows:
        for blocks in range(1, 70):
            found = directs(m, blocks * 128 - 96)
            assert found == [kind for kind in kinds if 3 * taken[kind] <= 4 * blocks or taken[kind] == least]
            assert found
    assert directs(rows[0], 10**6) == list(kinds)


def test_kinds_for_one_row_are_offered_where_k_is_whole_turns_and_x_is_short() -> None:
    longest = {kind: 8192 if kind.warps == 4 else 16384 for kind in ROW}  # of nine programs at once, or less
    for groups in range(1, 700):
        whole = [kind for kind in ROW if groups % (4 * kind.warps * kind.blocks) == 0]
        assert single_rows(1, groups * 32) == [kind for kind in whole if groups * 32 <= longest[kind]]
        assert not single_rows(2, groups * 32)
    assert single_rows(1, 4096) == single_rows(1, 8192) == list(ROW)


def test_kinds_of_tiles_of_32_are_offered_for_5_to_32_rows_and_whole_blocks() -> None:
    for m in range(1, 65):
        rows = next(height for height in (8, 16, 32, 64) if m <= height)
        expected = [kind for kind in NARROW if kind.rows == rows] if 5 <= m <= 32 else []
        assert list(narrows(m, 1024)) == expected
        assert not list(narrows(m, 1024 + 32))


def test_from_9_rows_on_several_warps_load_no_row_that_x_lacks() -> None:
    """For which TMA takes several times as long as for one that it has: boxes are moved up instead."""
    for m in range(9, 33):
        boxes = {kind.box: kind.rows for kind in narrows(m, 1024) if kind.warps > 1}
        assert boxes
        assert all(box <= m <= rows == 2 * box for box, rows in boxes.items())


def outputs(kind: Few) -> int:
    """Of a program."""
    if isinstance(kind, Direct):
        return 8 * kind.tiles
    return 32 if isinstance(kind, Narrow) else kind.outputs


def norm(waiting: float, reading: float) -> float:
    return math.sqrt(math.sqrt(waiting**4 + reading**4))


@pytest.mark.parametrize("kind", COSTS, ids=str)
def test_the_model_counts_programs_that_run_at_once(kind: Few) -> None:
    """By hand, on a chip of 100 multiprocessors."""
    cost, blocks = COSTS[kind], 4 * kind.warps * kind.blocks
    if not isinstance(kind, Narrow):
        at_once = 65536 // (kind.registers * 32 * kind.warps)
    else:
        at_once = {(8, 1): 8, (16, 1): 6}.get((kind.rows, kind.warps), 1)

    def wave(programs: float) -> float:
        return norm(4 * cost.turn, programs * blocks * cost.each) + cost.wave

    def found(programs: int) -> float:
        return microseconds(kind, cost, programs * outputs(kind), blocks * 128, 100)

    assert found(100 * at_once) == pytest.approx(cost.start + wave(at_once), rel=1e-12)
    assert found(250 * at_once) == pytest.approx(cost.start + 2 * wave(at_once) + wave(at_once / 2), rel=1e-12)
    assert found(2) == pytest.approx(cost.start + wave(0.02), rel=1e-12)


@pytest.mark.parametrize("kind", COSTS, ids=str)
def test_the_model_counts_turns_of_what_is_left(kind: Few) -> None:
    """By hand, for a program of each multiprocessor: a block more than whole turns takes one turn more, a short one if
    others have two blocks, and as many as a warp each has do not take another.
    """
    cost, n, warps = COSTS[kind], 100 * outputs(kind), kind.warps
    rest = 1.0 if kind.blocks == 1 else 0.7
    for left, turns in ((1, 3 + rest), (warps - 1, 3 + rest), (warps + 1, 3 + rest * kind.blocks)):
        if 0 < left < warps * kind.blocks:
            blocks = 3 * warps * kind.blocks + left
            expected = cost.start + norm(turns * cost.turn, blocks * cost.each) + cost.wave
            assert microseconds(kind, cost, n, blocks * 128, 100) == pytest.approx(expected, rel=1e-12)
            partly = cost.start + norm(turns * cost.turn, (blocks - 0.75) * cost.each) + cost.wave
            assert microseconds(kind, cost, n, blocks * 128 - 96, 100) == pytest.approx(partly, rel=1e-12)
