"""Plans for Hopper: whatever the size, one that the kernels can run and whose programs do each part once."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import launches, one_tile, source_of, tiled_kernels

from mxfp8_ops import packing
from mxfp8_ops.gpu import hopper, plans, tiles, tune
from mxfp8_ops.gpu.plans import Direct, Narrow, Plan, Skinny, Wide, candidates, microseconds, plan

CHIP = pytest.mark.parametrize("processors", [78, 114, 132])
FORM = pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
EDGES = (1, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 255, 256, 257, 300, 384, 385, 1000, 2048, 3072, 4097, 16384)
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
    return 64 * chosen.across if isinstance(chosen, Skinny) else 128


def tiles_of(chosen: Plan, m: int, n: int) -> int:
    return math.ceil(m / chosen.rows) * math.ceil(n / columns(chosen))


def split_of(chosen: Plan, m: int, n: int) -> int:
    """How many tiles are computed in parts."""
    if isinstance(chosen, Wide):
        return chosen.split
    return tiles_of(chosen, m, n) if isinstance(chosen, Skinny) and chosen.parts > 1 else 0


def check(chosen: Plan, m: int, n: int, k: int, packed: bool) -> None:
    """That the kernels can run it."""
    problem = f"{chosen} for {m} rows by [{n}, {k}]"
    if isinstance(chosen, Direct):
        assert packed, problem
        assert m <= chosen.rows in (4, 8), problem
        assert chosen.warps in (4, 8, 16), problem
        assert chosen.registers * chosen.warps * 32 <= plans.REGISTERS, problem
        return
    if isinstance(chosen, Narrow):
        assert packed, problem
        assert k % 128 == 0, problem
        assert m <= chosen.rows, problem
        assert chosen in {kind for kind, _, _ in plans.NARROW}, problem  # which tests/test_gpu_hopper.py compiles
        return
    blocks = math.ceil(k / 128)
    split = split_of(chosen, m, n)
    assert 1 <= chosen.parts <= blocks, problem  # each has a block at least: without one it would wait for ever
    assert 0 <= split <= tiles_of(chosen, m, n), problem
    assert (split == 0) == (chosen.parts == 1), problem
    if isinstance(chosen, Skinny):
        assert chosen.rows in (8, 16, 32, 64, 128), problem
        assert chosen.across * chosen.along in (1, 2, 4), problem  # consumers that the kernel knows how to start
        assert chosen.stages >= chosen.along, problem  # which then wait for stages of their own
        assert chosen.consumer_registers % 8 == 0, problem  # as setmaxnreg has it
    else:
        assert chosen.rows in (128, 256), problem


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
            taken = getattr(each, "parts", 1) * split_of(each, m, n) * each.rows * columns(each) * 4
            assert taken <= PARTIAL, f"{each} for {m} rows by [{n}, {k}]: {taken / 2**20:.0f} MiB"


@FORM
@CHIP
def test_the_plan_is_the_candidate_that_the_model_finds_fastest(processors: int, packed: bool) -> None:
    """But for the kernels for few rows, which are not in its table."""
    for n, k, m in itertools.product(N, K[packed], (*range(1, 131, 3), *EDGES)):
        chosen, found = plan(m, n, k, processors, packed), candidates(m, n, k, processors, packed)
        assert chosen in found
        if isinstance(chosen, Direct):
            assert packed
            assert m <= 8
        elif isinstance(chosen, Narrow):
            assert packed
            assert 4 < m <= 16
        else:
            time = functools.partial(microseconds, m=m, n=n, k=k, processors=processors, packed=packed)
            assert all(time(chosen) <= time(each) for each in found if isinstance(each, Skinny | Wide))


@FORM
def test_the_model_counts_what_a_chip_does_at_once(packed: bool) -> None:
    """By hand, for a kernel of which a multiprocessor runs two programs, and one of which it runs one."""
    for kind, at_once in ((Skinny(64, 1, 1, 4, 240, 128), 2), (Wide(256, 5, 0), 1)):
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
    whole, split = Wide(256, 5, 0), Wide(256, 5, 0, split=20, parts=5)
    cost = plans.TABLE[whole]
    moved = 5 * 20 * 256 * 128 * 4 * 2 / 1e6
    each = cost.turn[not packed] + cost.each[not packed]
    expected = 32 * each + cost.start + (32 / 5) * each + cost.start + cost.add + cost.megabyte * moved
    found = microseconds(split, 256, 120 * 128, 4096, 100, packed)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found < microseconds(whole, 256, 120 * 128, 4096, 100, packed)


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


# --- what each program does -----------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of ``tiles`` in Python, for the program whose number is set."""
    number = SimpleNamespace(value=0)
    gluon = SimpleNamespace(program_id=lambda axis: number.value, minimum=_smaller, maximum=max, static_range=range)
    monkeypatch.setattr(tiles, "gl", gluon)
    monkeypatch.setattr(tiles, "GROUP", tiles.GROUP.value)
    return number


def _smaller(one: Any, other: int) -> Any:
    return one.clamp(max=other) if isinstance(one, Tensor) else min(one, other)


SIZES = [
    (m, n, k)
    for m in (9, 16, 17, 33, 64, 128, 129, 255, 257, 300, 512, 2048, 4097, 16384)
    for n, k in ((1, 32), (7, 96), (288, 128), (1024, 4096), (4097, 28672), (14336, 4096), (28672, 96))
    if m * n <= 2**26
]


@CHIP
def test_programs_compute_every_block_of_every_tile_once(program: SimpleNamespace, processors: int) -> None:
    for chosen, m, n, k in _different(processors):
        launch = launches(chosen, m, n, k)[0]
        (programs,), arguments = launch.grid, launch.named
        blocks, whole, parts = math.ceil(k / 128), arguments["whole"], arguments["parts"]
        done: Counter[tuple[int, int]] = Counter()
        stored = []
        for program.value in range(programs):
            tile, part, first, steps = tiles.part_of_tile.fn(blocks, whole, parts)
            assert steps >= 1
            done.update((tile, block) for block in range(first, first + steps))
            if part >= 0:
                stored.append(part)
            else:
                assert (first, steps) == (0, blocks)
        assert set(done) == {(tile, block) for tile in range(tiles_of(chosen, m, n)) for block in range(blocks)}
        assert set(done.values()) == {1}
        assert stored == list(range(len(stored)))
        size = chosen.rows * columns(chosen)
        assert len(stored) == 0 or arguments["partial"].numel() == len(stored) * size


def test_parts_have_a_block_at_least_where_there_are_as_many(program: SimpleNamespace) -> None:
    """A part without one would wait for a stage that nobody loads."""
    for blocks, parts in itertools.product(range(1, 300), range(1, 9)):
        if parts > blocks:
            continue
        done = []
        for program.value in range(2, 2 + parts):  # two whole tiles come first
            tile, part, first, steps = tiles.part_of_tile.fn(blocks, 2, parts)
            assert (tile, part) == (2, program.value - 2)
            assert steps >= 1
            done += range(first, first + steps)
        assert done == list(range(blocks))


@CHIP
def test_both_forms_are_cut_up_alike(processors: int) -> None:
    """So what is shown here of packed weights holds for canonical ones."""
    for size in SIZES:
        found = [candidates(*size, processors, packed) for packed in (True, False)]
        assert [each for each in found[0] if isinstance(each, Skinny | Wide)] == found[1]
    for chosen, m, n, k in _different(processors):
        if k % 128 == 0:
            for one, other in zip(launches(chosen, m, n, k), launches(chosen, m, n, k, packed=False), strict=True):
                assert (one.kernel, one.grid) == (other.kernel, other.grid)
                same = set(one.named) - {"x", "bias", "out", "partial", "elements", "scales", "packed", "PACKED"}
                assert {name: one.named[name] for name in same} == {name: other.named[name] for name in same}


@CHIP
def test_tiles_cover_the_result_once(program: SimpleNamespace, processors: int) -> None:
    for chosen, m, n, _ in _different(processors):
        across, down = columns(chosen), chosen.rows
        found = [tiles.place_of_tile.fn(tile, m, n, down, across) for tile in range(tiles_of(chosen, m, n))]
        assert sorted(found) == [(row, column) for row in range(0, m, down) for column in range(0, n, across)]


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, 256])
def test_every_row_of_the_result_is_stored_once_and_is_the_row_that_was_loaded(
    program: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    loaded: list[tuple[Tensor, slice]] = []
    monkeypatch.setattr(tiles, "load_box", lambda x, at, ready, place, pred: loaded.append((at[0], place)))
    stage = SimpleNamespace(shape=(rows, 64), slice=lambda first, size: slice(first, first + size))
    for m in (*range(1, 1300), 2047, 2048, 2049, 3072, 4000, 4097):
        box = tiles.box_rows(rows, m)
        first = torch.arange(0, m, rows)[:, None]  # of every tile
        row, stored = tiles.rows_of_result.fn(torch.arange(rows), first, m, box)
        assert row[stored].sort().values.tolist() == list(range(m))
        assert torch.equal(row[stored] // rows, (first // rows).expand_as(row)[stored])  # by the tile whose row it is
        loaded.clear()
        tiles.load_rows.fn(None, first, m, 0, None, stage, box)
        found = torch.full_like(row, -1)
        for at, place in loaded:
            assert place.stop - place.start == box
            assert ((at >= 0) & (at + box <= max(m, box))).all()  # rows that are not there take TMA long
            assert (found[:, place] == -1).all()
            found[:, place] = at + torch.arange(box)
        assert (found >= 0).all()
        assert torch.equal(found[stored], row[stored])


@CHIP
def test_sums_of_parts_are_added_up_once_for_every_tile_in_parts(processors: int) -> None:
    for chosen, m, n, k in _different(processors):
        launched = launches(chosen, m, n, k)
        split = split_of(chosen, m, n)
        assert len(launched) == (2 if split else 1)
        for launch in launched[1:]:
            arguments = launch.named
            assert launch.kernel is tiles.mxfp8_add_parts
            assert (arguments["BM"], arguments["BN"]) == (chosen.rows, columns(chosen))
            assert launch.grid == (split * columns(chosen) // arguments["STEP"],)
            assert (arguments["whole"], arguments["parts"]) == (tiles_of(chosen, m, n) - split, chosen.parts)


def test_tiles_with_the_same_rows_of_the_weight_follow_each_other(program: SimpleNamespace) -> None:
    found = [tiles.place_of_tile.fn(tile, 40 * 256, 1024, 256, 128) for tile in range(40 * 8)]
    assert found[:5] == [(row * 256, 0) for row in range(4)] + [(0, 128)]
    assert found[-4:] == [(row * 256, 7 * 128) for row in range(36, 40)]


@functools.cache
def _different(processors: int) -> list[tuple[Plan, int, int, int]]:
    """Plans and candidates that cut their tiles differently, each with a problem."""
    found = {}
    for m, n, k in SIZES:
        for each in {plan(m, n, k, processors), *candidates(m, n, k, processors)}:
            if isinstance(each, Skinny | Wide):
                cut = (type(each), each.rows, columns(each), each.parts, split_of(each, m, n), m, n, k)
                found[cut] = (each, m, n, k)
    return [case for cut, case in found.items() if tiles_of(case[0], *case[1:3]) * math.ceil(case[3] / 128) < 2**15]


# --- int32 ----------------------------------------------------------------------------------------------------------


@FORM
@CHIP
def test_no_offset_of_the_kernels_exceeds_int32_where_dispatch_uses_them(processors: int, packed: bool) -> None:
    """They compute in 64 bits where the result, x and scales of canonical weights are concerned, and the partial sums
    of ``wide``. What is left are words of the weight, rows of x for ``direct`` and the parts of ``skinny``.
    """
    for n, k in itertools.product((*N, 524288, 65536 * 128 - 1), (*K[packed], 2**20)):
        words = math.prod(packing.packed_shape(n, k)) if packed else n * k
        if words >= 2**31:
            continue  # dequantized as a whole
        for m in EDGES:
            chosen = plan(m, n, k, processors, packed)
            tile = chosen.rows * columns(chosen)
            programs = tiles_of(chosen, m, n) + split_of(chosen, m, n) * (getattr(chosen, "parts", 1) - 1)
            assert programs < 2**31
            if isinstance(chosen, Direct):
                assert chosen.rows * max(n, k // 2 + 128 * chosen.warps) < 2**31
            elif isinstance(chosen, Skinny):
                assert chosen.parts * split_of(chosen, m, n) * tile < 2**31


# --- cliffs ---------------------------------------------------------------------------------------------------------


SHAPES = pytest.mark.parametrize(
    ("n", "k"), [(1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
)


@FORM
@CHIP
@SHAPES
def test_a_row_more_costs_a_row_of_tiles_at_most_and_never_less(processors: int, n: int, k: int, packed: bool) -> None:
    """By the model. It rises where another row of tiles begins. Up to 64 rows the weight takes the time, so hardly at
    all; from 128 to 129 the matrix units have to do twice as much.
    """
    edges = [16, 32, *range(64, 2048, 64)]
    times = [modelled(m, n, k, processors, packed) for m in range(9, 301)]
    for m, (before, after) in enumerate(itertools.pairwise(times), 9):
        assert m in edges or before == after
    for m in edges:
        limit = 1.3 if m < 64 else 1.55 if m < 128 else 2
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
