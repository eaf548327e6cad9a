"""Plans for up to eight rows of x on packed weights: by the model for up to four, by the number of programs above."""

from __future__ import annotations

import math

import pytest
from planning import CHIP, N

from mxfp8_ops.gpu.plans_direct import EIGHT, FOUR, Direct, direct, microseconds

BLOCKS = (1, 2, 3, 9, 20, 32, 100, 224)
"""Of K."""


@CHIP
def test_up_to_four_rows_take_the_kind_that_the_model_finds_fastest_of_those_with_work_for_all_warps(
    processors: int,
) -> None:
    found: set[Direct] = set()
    for n in (*N, 1024, 4096, 8192, 14336, 51200):
        for blocks in BLOCKS:
            k = blocks * 128 - 96
            chosen = direct(4, n, k, processors)
            assert chosen is not None
            assert all(direct(m, n, k, processors) == chosen for m in (1, 2, 3))
            least = min(kind.warps * kind.blocks for kind in FOUR)
            busy = [kind for kind in FOUR if kind.warps * kind.blocks <= max(blocks, least)]
            assert chosen in busy
            time = microseconds(chosen, n, k, processors)
            assert all(time <= microseconds(kind, n, k, processors) for kind in busy)
            found.add(chosen)
    assert len(found) >= len(FOUR) // 2


@pytest.mark.parametrize("kind", FOUR, ids=str)
def test_the_model_counts_programs_that_run_at_once(kind: Direct) -> None:
    """By hand, on a chip of 100 multiprocessors."""
    cost, blocks = FOUR[kind], 4 * kind.warps * kind.blocks
    outputs = 8 * kind.tiles
    at_once = 65536 // (kind.registers * 32 * kind.warps)

    def wave(programs: float) -> float:
        return max(4 * cost.turn, programs * blocks * cost.each) + cost.wave

    def found(programs: int) -> float:
        return microseconds(kind, programs * outputs, blocks * 128, 100)

    assert found(100 * at_once) == pytest.approx(cost.start + wave(at_once), rel=1e-12)
    assert found(250 * at_once) == pytest.approx(cost.start + 2 * wave(at_once) + wave(at_once / 2), rel=1e-12)
    assert found(1) == pytest.approx(cost.start + 4 * cost.turn + cost.wave, rel=1e-12)


@CHIP
def test_five_to_eight_rows_take_the_first_kind_whose_programs_all_start_at_once(processors: int) -> None:
    found = set()
    for n in range(16, 65536, 304):
        chosen = direct(8, n, 4096, processors)
        fits = [math.ceil(n / 16) * 2 / kind.tiles <= kind.at_once * processors for kind in EIGHT]
        assert chosen == (EIGHT[fits.index(True)] if any(fits) else None)
        assert direct(5, n, 4096, processors) == chosen
        found.add(chosen)
    assert None in found
    assert len(found) >= 3
