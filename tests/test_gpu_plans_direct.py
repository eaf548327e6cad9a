"""Kinds of the kernel for up to eight rows of x on packed weights, and the model of their time."""

from __future__ import annotations

import pytest

from mxfp8_ops.gpu.plans_direct import COSTS, EIGHT, FOUR, Cost, Direct, directs, microseconds


@pytest.mark.parametrize(
    ("kinds", "rows", "working"), [(FOUR, (1, 2, 3, 4), 4), (EIGHT, (5, 6, 7, 8), 3)], ids=["four", "eight"]
)
def test_kinds_are_offered_if_all_or_three_quarters_of_their_warps_have_work(
    kinds: dict[Direct, Cost], rows: tuple[int, ...], working: int
) -> None:
    taken = {kind: kind.warps * kind.blocks for kind in kinds}
    least = min(taken.values())
    for m in rows:
        for blocks in range(1, 70):
            found = directs(m, blocks * 128 - 96)
            assert found == [kind for kind in kinds if working * taken[kind] <= 4 * blocks or taken[kind] == least]
            assert found
    assert directs(rows[0], 10**6) == list(kinds)


@pytest.mark.parametrize("kind", COSTS, ids=str)
def test_the_model_counts_programs_that_run_at_once(kind: Direct) -> None:
    """By hand, on a chip of 100 multiprocessors."""
    cost, blocks = COSTS[kind], 4 * kind.warps * kind.blocks
    outputs = 8 * kind.tiles
    at_once = 65536 // (kind.registers * 32 * kind.warps)

    def wave(programs: float) -> float:
        return max(4 * cost.turn, programs * blocks * cost.each) + cost.wave

    def found(programs: int) -> float:
        return microseconds(kind, programs * outputs, blocks * 128, 100)

    assert found(100 * at_once) == pytest.approx(cost.start + wave(at_once), rel=1e-12)
    assert found(250 * at_once) == pytest.approx(cost.start + 2 * wave(at_once) + wave(at_once / 2), rel=1e-12)
    assert found(1) == pytest.approx(cost.start + 4 * cost.turn + cost.wave, rel=1e-12)
