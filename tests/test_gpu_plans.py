"""Plans for Hopper: whatever the size, one that the kernels can run, and the fastest by the model or by measurement."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import one_tile, source_of, tiled_kernels
from planning import CHIP, EDGES, FORM, PARTIAL, K, N, columns, split_of, tiles_of

from mxfp8_ops.gpu import hopper, plans, plans_few, plans_vectors, tune
from mxfp8_ops.gpu.counts import REGISTERS
from mxfp8_ops.gpu.kinds_few import Direct, Narrow, Row, Vectors
from mxfp8_ops.gpu.plans import Plan, Skinny, Wide, candidates, microseconds, plan


def check(chosen: Plan, m: int, n: int, k: int, packed: bool) -> None:
    """That the kernels can run it."""
    problem = f"{chosen} for {m} rows by [{n}, {k}]"
    if isinstance(chosen, Direct):
        assert packed, problem
        assert m <= chosen.rows in (1, 4, 8), problem
        if isinstance(chosen, Row):
            assert k % (128 * chosen.together) == 0, problem
            assert k <= 16384, problem  # turns are written out
        assert chosen.warps in (2, 4, 8, 16), problem
        assert chosen.registers * chosen.warps * 32 <= REGISTERS, problem
        return
    if isinstance(chosen, Narrow):
        assert packed, problem
        assert k % 128 == 0, problem
        assert m <= chosen.rows, problem
        assert chosen in plans_few.NARROW, problem  # which tests/test_gpu_hopper.py compiles
        return
    if isinstance(chosen, Vectors):
        assert not packed, problem
        assert m <= chosen.rows <= 16, problem
        assert chosen in plans_vectors.COSTS, problem  # which tests/test_gpu_vectors.py compiles
        return
    blocks = math.ceil(k / 128)
    if isinstance(chosen, Skinny):
        assert 1 <= chosen.parts <= blocks, problem  # each has a block at least: without one it would wait for ever
        assert chosen.rows in (8, 16, 32, 48, 64, 80, 96, 128, 160, 192), problem
        assert chosen.across * chosen.along in (1, 2, 4), problem  # consumers that the kernel knows how to start
        assert chosen.stages >= chosen.along, problem  # which then wait for stages of their own
        assert chosen.consumer_registers % 8 == 0, problem  # as setmaxnreg has it
    else:
        tiles = tiles_of(chosen, m, n)
        assert chosen.rows in (256, 320), problem
        assert 0 <= chosen.shared <= tiles, problem
        assert (tiles - chosen.shared) % chosen.programs == 0 or not chosen.shared, problem
        assert chosen.shared < 2 * chosen.programs, problem
        assert chosen.shared * blocks >= plans.SHARE * chosen.programs or not chosen.shared, problem


@FORM
@CHIP
def test_every_candidate_is_one_that_the_kernels_can_run_and_different(processors: int, packed: bool) -> None:
    for n, k, m in itertools.product(N, K[packed], EDGES):
        found = candidates(m, n, k, processors, packed)
        assert len(set(found)) == len(found) > 1
        for each in found:
            check(each, m, n, k, packed)
            if m > 8 and isinstance(each, Skinny | Wide):
                assert one_tile(each) in tiled_kernels(packed)  # which tests/test_gpu_hopper.py compiles


@FORM
@CHIP
def test_parts_of_every_candidate_take_bounded_memory(processors: int, packed: bool) -> None:
    for n, k, m in itertools.product(N, (4096, 28672), EDGES):
        for each in candidates(m, n, k, processors, packed):
            parts = each.programs if isinstance(each, Wide) else getattr(each, "parts", 1) * split_of(each, m, n)
            taken = parts * each.rows * columns(each) * 4
            assert taken <= PARTIAL, f"{each} for {m} rows by [{n}, {k}]: {taken / 2**20:.0f} MiB"


@FORM
@CHIP
def test_the_plan_is_the_candidate_that_the_model_finds_fastest(processors: int, packed: bool) -> None:
    """Of all, or of those of ``row`` and ``direct`` for up to four rows of x and a packed weight."""
    for n, k, m in itertools.product(N, K[packed], (*range(1, 131, 3), *EDGES)):
        chosen, found = plan(m, n, k, processors, packed), candidates(m, n, k, processors, packed)
        if packed and m <= 4:
            found = [each for each in found if isinstance(each, Direct)]
            rows = [each for each in found if isinstance(each, Row)]
            assert bool(rows) == (m == 1 and k % 1024 == 0 and k <= 16384)
            found = rows if rows and k <= 4096 else found
        assert chosen in found
        time = functools.partial(microseconds, m=m, n=n, k=k, processors=processors, packed=packed)
        assert all(time(chosen) <= time(each) for each in found)


def test_narrow_takes_9_to_32_rows_if_its_tiles_are_as_many_as_multiprocessors() -> None:
    """Up to 32: to end at 16 made 17 rows take 1.3 times as long."""
    for m in range(9, 33):
        assert isinstance(plan(m, 4096, 4096, 132), Narrow)
        assert isinstance(plan(m, 132 * 32, 4096, 132), Narrow)
        assert isinstance(plan(m, 133 * 32, 4096, 132), Skinny)


@FORM
def test_the_model_counts_what_a_chip_does_at_once(packed: bool) -> None:
    """By hand, for kernels of which a multiprocessor runs one program and two."""
    for kind, at_once in ((Skinny(64, 1, 1, 4, 240, 128), 2), (Skinny(128, 2, 1, 4, 240, 0), 1)):
        cost = plans.TABLE[kind]
        assert cost.at_once == at_once
        turn, each = cost.turn[not packed], cost.each[not packed]
        for tiles_a_processor in (1, 2, 3, 5):
            n = columns(kind) * 100 * tiles_a_processor
            turns = math.ceil(tiles_a_processor / at_once)
            expected = 32 * (turns * turn + tiles_a_processor * each) + turns * cost.start
            found = microseconds(kind, kind.rows, n, 4096, 100, packed)
            assert found == pytest.approx(expected, rel=1e-12)
            assert microseconds(kind, kind.rows, n - 1, 4096, 100, packed) == found
            assert microseconds(kind, kind.rows, n, 4096 - 127, 100, packed) == found
            assert microseconds(kind, kind.rows + 1, n, 4096, 100, packed) > found
    whole = Skinny(128, 2, 1, 4, 240, 0)
    cost = plans.TABLE[whole]
    moved = 4 * 30 * 128 * 128 * 4 * 2 / 1e6
    expected = 8 * 2 * (cost.turn[not packed] + cost.each[not packed]) + 2 * cost.start
    expected += cost.add + cost.megabyte * moved + 3 * plans.PART * 128 * 128
    found = microseconds(replace(whole, parts=4), 128, 30 * 128, 4096, 60, packed)
    assert found == pytest.approx(expected, rel=1e-12)


@FORM
@pytest.mark.parametrize("rows", [256, 320])
def test_the_model_counts_what_programs_share(rows: int, packed: bool) -> None:
    """By hand: rounds of whole tiles, a share with two other pieces, sums that are added from other programs, and equal
    parts.
    """
    cost = plans.WIDE[rows][not packed]
    whole = cost.start + 3 * (32 * cost.each + cost.tile)
    assert microseconds(Wide(100, 0, rows), rows, 250 * 128, 4096, 100, packed) == pytest.approx(whole, rel=1e-12)
    shared = cost.start + 32 * cost.each + cost.tile + 1.5 * 32 * cost.each * plans.APART + 2.5 * cost.tile
    shared += cost.share + cost.add
    assert microseconds(Wide(100, 150, rows), rows, 250 * 128, 4096, 100, packed) == pytest.approx(shared, rel=1e-12)
    alone = cost.start + 0.4 * 32 * cost.each * plans.APART + 1.4 * cost.tile + cost.share + 3 * cost.add
    assert microseconds(Wide(100, 40, rows), rows, 40 * 128, 4096, 100, packed) == pytest.approx(alone, rel=1e-12)
    equal = cost.start + 32 / 4 * cost.each + cost.tile + 3 * cost.part
    assert microseconds(Wide(100, 25, rows), rows, 25 * 128, 4096, 100, packed) == pytest.approx(equal, rel=1e-12)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Tuning, in which the candidate of the number ``fastest`` is, on a chip that is not there."""
    state = SimpleNamespace(fastest=0, measured=0, capturing=False)

    def measure(named: dict[str, Plan], run: Any) -> dict[str, float]:
        state.measured += 1
        return {list(named)[state.fastest % len(named)]: 1.0}

    monkeypatch.setenv("MXFP8_AUTOTUNE", "1")
    monkeypatch.setenv("MXFP8_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(tune, "_device", lambda: "a chip")
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(hopper, "_plans", {})
    return state


def planned(m: int, n: int, k: int, packed: bool) -> Plan:
    """What ``hopper`` takes for a problem."""
    with torch.device("meta"):
        x, out = (torch.empty(m, size, dtype=torch.bfloat16) for size in (k, n))
        return hopper._plan(x, source_of(n, k, packed), None, out)


@FORM
def test_what_was_measured_is_taken_for_its_problem_alone(tuned: SimpleNamespace, packed: bool) -> None:
    problems = [(m, n, k) for m in (9, 128, 129, 257, 512) for n, k in ((1024, 4096), (4097, 128))]
    for turn in range(2):  # measured, then remembered
        for tuned.fastest, (m, n, k) in enumerate(problems):
            chosen = planned(m, n, k, packed)
            named = list(dict.fromkeys([plan(m, n, k, 132, packed), *candidates(m, n, k, 132, packed)]))
            assert chosen == named[tuned.fastest % len(named)]
            check(chosen, m, n, k, packed)
            assert tuned.measured == (tuned.fastest + 1 if turn == 0 else len(problems))


def test_both_forms_of_a_weight_are_measured_for_themselves(tuned: SimpleNamespace) -> None:
    found = []
    for tuned.fastest, packed in enumerate((True, False)):
        found.append(planned(128, 4096, 4096, packed))
    assert tuned.measured == 2
    assert found[1] != found[0] == plan(128, 4096, 4096, 132, True)


@FORM
def test_while_a_graph_is_captured_the_plan_of_the_model_is_taken_for_now(tuned: SimpleNamespace, packed: bool) -> None:
    tuned.fastest, tuned.capturing = 1, True
    modelled = plan(128, 4096, 4096, 132, packed)
    assert planned(128, 4096, 4096, packed) == modelled
    assert tuned.measured == 0
    tuned.capturing = False
    assert planned(128, 4096, 4096, packed) != modelled


# --- cliffs ---------------------------------------------------------------------------------------------------------

HEIGHTS = 48, 64, 80, 96, 128, 160, 192, 256, 320
"""Rows of x of a tile."""

SHAPES = pytest.mark.parametrize(
    ("n", "k"), [(1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
)


@FORM
@CHIP
@SHAPES
def test_a_row_more_costs_a_row_of_tiles_at_most_and_never_less(processors: int, n: int, k: int, packed: bool) -> None:
    """By the model. It rises where another row of tiles begins, of whatever height. Up to 160 rows there is a tile of a
    few rows more, from 256 to 257 one of 320.
    """
    edges = sorted({16, 32, *(rows for height in HEIGHTS for rows in range(height, 2048, height))})
    times = [modelled(m, n, k, processors, packed) for m in range(9, 301)]
    for m, (before, after) in enumerate(itertools.pairwise(times), 9):
        assert m in edges or before == after
    for m in edges:
        limit = 1.3 if m <= 160 else 1.55
        before, after = (modelled(each, n, k, processors, packed) for each in (m, m + 1))
        assert before <= after <= limit * before, f"{m} rows: {before}, one more: {after}"


@FORM
@CHIP
@SHAPES
def test_twice_as_many_rows_take_twice_as_long_at_most(processors: int, n: int, k: int, packed: bool) -> None:
    for m in (9, 16, 20, 32, 40, 64, 80, 100, 128, 150, 200, 256, 300, 400, 512, 700, 1024, 1500, 2048):
        time, twice = (modelled(each, n, k, processors, packed) for each in (m, 2 * m))
        assert twice <= 2.02 * time, f"{2 * m} rows: {twice}, half as many: {time}"


def modelled(m: int, n: int, k: int, processors: int, packed: bool) -> float:
    """Microseconds of the plan, or of the best one that the model knows: it knows none for few rows."""
    known = [each for each in candidates(m, n, k, processors, packed) if isinstance(each, Skinny | Wide)]
    return min(microseconds(each, m, n, k, processors, packed) for each in known)
