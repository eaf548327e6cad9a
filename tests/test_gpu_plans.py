"""Plans for packed weights: whatever the size, one that the kernels can run and whose programs do each part once."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import launches

from mxfp8_ops import packing
from mxfp8_ops.gpu import packed, plans, tiles, tune
from mxfp8_ops.gpu.plans import Direct, Plan, Skinny, Wide, candidates, plan

CHIP = pytest.mark.parametrize("processors", [78, 114, 132])
ROWS = (*range(1, 301), 512, 1000, 2048, 4097, 16384)
N = (1, 7, 288, 1024, 4097, 14336, 28672, 151936)
K = (32, 96, 128, 4096, 14336, 28672)
PARTIAL = 256 * 2**20
"""Bytes that the sums of parts may take."""


def columns(chosen: Plan) -> int:
    """Outputs of a tile."""
    return 16 if isinstance(chosen, Direct) else 64 * chosen.across if isinstance(chosen, Skinny) else 128


def tiles_of(chosen: Plan, m: int, n: int) -> int:
    return math.ceil(m / chosen.rows) * math.ceil(n / columns(chosen))


def split_of(chosen: Plan, m: int, n: int) -> int:
    """How many tiles are computed in parts."""
    if isinstance(chosen, Wide):
        return chosen.split
    return tiles_of(chosen, m, n) if isinstance(chosen, Skinny) and chosen.parts > 1 else 0


def check(chosen: Plan, m: int, n: int, k: int) -> None:
    """That the kernels can run it."""
    problem = f"{chosen} for {m} rows by [{n}, {k}]"
    if isinstance(chosen, Direct):
        assert m <= chosen.rows == 8, problem
        assert chosen.warps in (1, 2, 4, 8, 16), problem
        assert chosen.registers * chosen.warps * 32 <= plans.REGISTERS, problem
        return
    blocks = math.ceil(k / 128)
    split = split_of(chosen, m, n)
    assert 1 <= chosen.parts <= blocks, problem  # each has a block at least
    assert 0 <= split <= tiles_of(chosen, m, n), problem
    assert (split == 0) == (chosen.parts == 1), problem
    if isinstance(chosen, Skinny):
        assert m <= chosen.rows, problem
        assert chosen.across * chosen.along in (1, 2, 4), problem  # consumers that the kernel knows how to start
        assert chosen.stages >= chosen.along, problem  # which then wait for stages of their own
        assert chosen.consumer_registers % 8 == 0, problem  # as setmaxnreg has it
    else:
        assert chosen.rows in (128, 256), problem


@CHIP
def test_every_plan_of_the_table_is_one_that_the_kernels_can_run(processors: int) -> None:
    for n in N:
        for k in K:
            for m in ROWS:
                chosen = plan(m, n, k, processors)
                check(chosen, m, n, k)
                rows_of_tiles = getattr(chosen, "parts", 1) * split_of(chosen, m, n) * chosen.rows
                assert rows_of_tiles * columns(chosen) * 4 <= PARTIAL


@CHIP
def test_every_candidate_is_one_that_the_kernels_can_run_and_different(processors: int) -> None:
    for n in N:
        for k in K:
            for m in (*range(1, 301, 13), 1000, 4097):
                found = candidates(m, n, k, processors)
                assert len(set(found)) == len(found) > 1
                for each in found:
                    check(each, m, n, k)


@CHIP
def test_parts_of_every_candidate_take_bounded_memory(processors: int) -> None:
    for n in N:
        for m in (16, 64, 128, 300, 4097):
            for each in candidates(m, n, 4096, processors):
                taken = getattr(each, "parts", 1) * split_of(each, m, n) * each.rows * columns(each) * 4
                assert taken <= PARTIAL, f"{each} for {m} rows by [{n}, 4096]: {taken / 2**20:.0f} MiB"


@CHIP
def test_candidates_contain_the_kernel_that_the_table_chooses(processors: int) -> None:
    for n in N:
        for m in (1, 4, 5, 8, 9, 16, 17, 33, 65, 128, 129, 256, 300):
            chosen = plan(m, n, 4096, processors)
            assert type(chosen) in {type(each) for each in candidates(m, n, 4096, processors)}


@pytest.mark.parametrize(
    "rows", [(512, 257), (257, 512), (384, 385), (129, 256), (256, 129), (16, 9), (65, 128)], ids=str
)
def test_what_was_measured_for_some_rows_can_be_run_for_others(
    rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numbers of rows that are tuned together are tuned once, whichever comes first and whatever is fastest."""
    monkeypatch.setenv("MXFP8_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(tune, "_device", lambda: "a chip")
    for n, k in ((1024, 4096), (4096, 4096), (4097, 96)):
        for fastest in range(12):
            monkeypatch.setenv("MXFP8_CACHE_DIR", str(tmp_path / f"{n}-{fastest}"))
            monkeypatch.setattr(tune, "_chosen", {})
            monkeypatch.setattr(packed, "_plans", {})
            monkeypatch.setattr(
                tune, "measure", lambda named, run, fastest=fastest: {list(named)[fastest % len(named)]: 1.0}
            )
            for m in rows:
                x, out = (torch.empty(m, size, dtype=torch.bfloat16, device="meta") for size in (k, n))
                check(packed._plan(x, out, None, out), m, n, k)


# --- what each program does -----------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of ``tiles`` in Python, for the program whose number is set."""
    number = SimpleNamespace(value=0)
    gluon = SimpleNamespace(program_id=lambda axis: number.value, minimum=min)
    monkeypatch.setattr(tiles, "gl", gluon)
    monkeypatch.setattr(tiles, "GROUP", tiles.GROUP.value)
    return number


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


@CHIP
def test_tiles_cover_the_result_once(program: SimpleNamespace, processors: int) -> None:
    for chosen, m, n, _ in _different(processors):
        across, down = columns(chosen), chosen.rows
        found = [tiles.place_of_tile.fn(tile, m, n, down, across) for tile in range(tiles_of(chosen, m, n))]
        assert sorted(found) == [(row, column) for row in range(0, m, down) for column in range(0, n, across)]


@CHIP
def test_sums_of_parts_are_added_up_once_for_every_tile_in_parts(processors: int) -> None:
    for chosen, m, n, k in _different(processors):
        launched = launches(chosen, m, n, k)
        split = split_of(chosen, m, n)
        assert len(launched) == (2 if split else 1)
        for launch in launched[1:]:
            arguments = launch.named
            assert launch.kernel is tiles.add_parts
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
            if not isinstance(each, Direct):
                cut = (type(each), each.rows, columns(each), each.parts, split_of(each, m, n), m, n, k)
                found[cut] = (each, m, n, k)
    return [case for cut, case in found.items() if tiles_of(case[0], *case[1:3]) * math.ceil(case[3] / 128) < 2**15]


# --- int32 ----------------------------------------------------------------------------------------------------------


@CHIP
def test_no_offset_of_the_kernels_exceeds_int32_where_dispatch_uses_them(processors: int) -> None:
    """They compute in 64 bits where the result, x and the whole of the partial sums are concerned. What is left are
    words of the packed weight, rows of x for ``direct`` and the parts of ``skinny``.
    """
    for n in (*N, 524288, 65536 * 128 - 1):
        for k in (*K, 2**20):
            if math.prod(packing.packed_shape(n, k)) >= 2**31:
                continue  # dequantized as a whole
            for m in ROWS:
                chosen = plan(m, n, k, processors)
                tile = chosen.rows * columns(chosen)
                programs = tiles_of(chosen, m, n) + split_of(chosen, m, n) * (getattr(chosen, "parts", 1) - 1)
                assert programs < 2**31
                if isinstance(chosen, Direct):
                    assert chosen.rows * max(n, k // 2 + 128 * chosen.warps) < 2**31
                elif isinstance(chosen, Skinny):
                    assert chosen.parts * split_of(chosen, m, n) * tile < 2**31


# --- choices --------------------------------------------------------------------------------------------------------


@CHIP
@pytest.mark.parametrize(("n", "k"), [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
def test_one_more_row_costs_a_row_of_tiles_at_most_and_never_less(processors: int, n: int, k: int) -> None:
    """By the model of the table. Such a row of tiles doubles the time where there was one, and from 129 rows to 2048
    there are no more than 16 times as many.
    """
    times = [plans._microseconds(plan(m, n, k, processors), m, n, k, processors) for m in range(129, 2049)]
    for before, after in itertools.pairwise(times):
        assert before <= after <= 2.05 * before
    assert times[-1] <= 16 * times[0]


@CHIP
def test_of_the_choices_for_many_rows_none_is_modelled_faster(processors: int) -> None:
    for n in N:
        for m in (129, 200, 256, 300, 512, 1000, 4097):
            chosen = plan(m, n, 4096, processors)
            time = functools.partial(plans._microseconds, m=m, n=n, k=4096, processors=processors)
            assert all(time(chosen) <= time(each) for each in candidates(m, n, 4096, processors))
            assert time(chosen) <= time(Wide(256, 5, 0))


@CHIP
def test_a_row_more_changes_the_kernel_only_after_powers_of_two(processors: int) -> None:
    for n in N:
        for k in K:
            kernels = [_constants(plan(m, n, k, processors)) for m in range(1, 129)]
            changes = [m for m in range(2, 129) if kernels[m - 1] != kernels[m - 2]]
            assert set(changes) <= {5, 9, 17, 33, 65}


def _constants(chosen: Plan) -> tuple[object, ...]:
    return type(chosen), *astuple(replace(chosen, parts=1) if isinstance(chosen, Skinny) else chosen)
