"""What each program of a plan does: every block of every tile once, and every result."""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import launches
from planning import CHIP, EDGES, FORM, K, N, check_each_block_once, columns, split_of, tiles_of

from mxfp8_ops import packing
from mxfp8_ops.gpu import heights, partial_sums, skinny, tiles
from mxfp8_ops.gpu.kinds_few import Direct
from mxfp8_ops.gpu.plans import Skinny, Wide, candidates, plan

STORING: int = partial_sums.STORING.value


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of ``tiles`` and ``heights`` in Python, for the program whose number is set."""
    number = SimpleNamespace(value=0)
    gluon = SimpleNamespace(program_id=lambda axis: number.value, minimum=_smaller, maximum=max, static_range=range)
    gluon.where = lambda condition, one, other: one if condition else other
    gluon.umulhi = lambda one, other: one * other >> 32
    for module in (heights, tiles):
        monkeypatch.setattr(module, "gl", gluon)
    for name in ("_load_boxes", "moved_up"):
        monkeypatch.setattr(heights, name, getattr(heights, name).fn)
    monkeypatch.setattr(tiles, "_divided_by_few", tiles._divided_by_few.fn)
    monkeypatch.setattr(tiles, "GROUP", tiles.GROUP.value)
    monkeypatch.setattr(tiles, "part_begins", partial_sums.part_begins.fn)
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
@FORM
def test_programs_compute_every_block_of_every_tile_once(
    program: SimpleNamespace, processors: int, packed: bool
) -> None:
    for chosen, m, n, k in _different(processors, Skinny):
        launch = launches(chosen, m, n, k)[0]
        (programs,), arguments = launch.grid, launch.named
        blocks, parts = math.ceil(k / 128), arguments["parts"]
        longer = skinny.last_part_longer.fn(packed, chosen.rows, chosen.stages)
        done = []
        for program.value in range(programs):
            tile, part, first, steps = tiles.part_of_tile.fn(blocks, parts, longer)
            assert steps >= 1
            assert program.value == tile * parts + part
            done.append((tile, first, steps))
        check_each_block_once(done, tiles_of(chosen, m, n), blocks)


@CHIP
def test_programs_that_share_a_tile_have_memory_for_the_sums_of_each(processors: int) -> None:
    for chosen, m, n, k in _different(processors, Skinny):
        (launch,) = launches(chosen, m, n, k)
        assert launch.named["parts"] == chosen.parts
        if chosen.parts > 1:
            bytes_of_each = chosen.across * (64 * chosen.rows * 4 + 8)
            assert launch.named["partial"].numel() * 4 == launch.grid[0] * bytes_of_each


def test_parts_have_a_block_at_least_where_there_are_as_many(program: SimpleNamespace) -> None:
    """And the last one, which waits for the others, as many more as they take to store their sums."""
    for blocks, parts, storing in itertools.product(range(1, 300), range(1, 9), (STORING, STORING + 1)):
        if parts + storing > blocks and parts > 1:
            continue
        done, counts = [], []
        for program.value in range(2 * parts, 3 * parts):
            tile, part, first, steps = tiles.part_of_tile.fn(blocks, parts, storing)
            assert (tile, part) == (2, program.value - 2 * parts)
            counts.append(steps)
            done += range(first, first + steps)
        assert done == list(range(blocks))
        assert min(counts) >= 1
        if parts > 1:
            assert max(counts[:-1]) - min(counts[:-1]) <= 1
            assert storing <= counts[-1] - max(counts[:-1]) <= storing + 1


@CHIP
def test_both_forms_are_cut_up_alike(processors: int) -> None:
    """So what is shown here of packed weights holds for canonical ones."""
    of_the_weight = "elements", "scales", "packed", "PACKED"
    for size in SIZES:
        found = [
            [each for each in candidates(*size, processors, packed) if isinstance(each, Skinny | Wide)]
            for packed in (True, False)
        ]
        assert found[0] == found[1]
    for chosen, m, n, k in _different(processors, Skinny | Wide):
        if k % 128 == 0:
            for one, other in zip(launches(chosen, m, n, k), launches(chosen, m, n, k, packed=False), strict=True):
                assert (one.kernel, one.grid) == (other.kernel, other.grid)
                same = set(one.named) - {"x", "later_x", "bias", "out", "partial", *of_the_weight}
                assert {name: one.named[name] for name in same} == {name: other.named[name] for name in same}


@CHIP
def test_tiles_cover_the_result_once(program: SimpleNamespace, processors: int) -> None:
    for chosen, m, n, _ in _different(processors, Skinny | Wide):
        across, down = columns(chosen), chosen.rows
        found = [tiles.place_of_tile.fn(tile, m, n, down, across) for tile in range(tiles_of(chosen, m, n))]
        assert sorted(found) == [(row, column) for row in range(0, m, down) for column in range(0, n, across)]


@pytest.mark.parametrize("rows", [8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320])
def test_every_row_of_the_result_is_stored_once_and_is_the_row_that_was_loaded(
    program: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    loaded: list[tuple[int, Tensor, slice]] = []
    monkeypatch.setattr(heights, "load_box", lambda x, at, ready, place: loaded.append((x.number, at[0], place)))
    head = heights.head_of.fn(rows)
    sizes = [head, rows - head] if rows > head else [head]
    pieces = [SimpleNamespace(shape=(size, 64), slice=lambda first, size: slice(first, first + size)) for size in sizes]
    for m in (*range(1, 1300), 2047, 2048, 2049, 3072, 4000, 4097):
        boxes = heights.box_rows(rows, m)
        first = torch.arange(0, m, rows)[:, None]  # of every tile
        loaded.clear()
        heights.load_rows.fn([described(i, box) for i, box in enumerate(boxes)], first, m, 0, None, pieces)
        results = []
        for i, size in enumerate(sizes):
            row, stored = heights.rows_of_result.fn(torch.arange(size), first + i * head, m, boxes[i])
            assert torch.equal(row[stored] // rows, (first // rows).expand_as(row)[stored])  # by the tile whose it is
            found = torch.full_like(row, -1)
            for number, at, place in loaded:
                if number == i:
                    assert place.stop - place.start == boxes[i]
                    assert ((at >= 0) & (at + boxes[i] <= max(m, boxes[i]))).all()  # rows that are not there take long
                    assert (found[:, place] == -1).all()
                    found[:, place] = at + torch.arange(boxes[i])
            assert (found >= 0).all()
            assert torch.equal(found[stored], row[stored])
            results += row[stored].tolist()
        assert sorted(results) == list(range(m))


def described(number: int, box: int) -> SimpleNamespace:
    return SimpleNamespace(number=number, block_type=SimpleNamespace(shape=(box, 64)))


def test_tiles_with_the_same_rows_of_the_weight_follow_each_other(program: SimpleNamespace) -> None:
    found = [tiles.place_of_tile.fn(tile, 40 * 256, 1024, 256, 128) for tile in range(40 * 8)]
    assert found[:5] == [(row * 256, 0) for row in range(4)] + [(0, 128)]
    assert found[-4:] == [(row * 256, 7 * 128) for row in range(36, 40)]


def test_numbers_are_divided_by_few_without_a_division(program: SimpleNamespace) -> None:
    for few in (1, 2, 3, 4):
        for number in (*range(2**12), *range(2**16 - 4, 2**16 + 4), *range(2**31 - 2**12, 2**31)):
            assert tiles._divided_by_few(number, few) == number // few


@functools.cache
def _different(processors: int, kinds: Any) -> list[tuple[Any, int, int, int]]:
    """Plans and candidates of some kinds that cut their tiles differently, each with a problem."""
    found = {}
    for m, n, k in SIZES:
        for each in {plan(m, n, k, processors), *candidates(m, n, k, processors)}:
            if isinstance(each, kinds):
                cut = (type(each), each.rows, columns(each), getattr(each, "parts", 0), split_of(each, m, n), m, n, k)
                found[cut] = (each, m, n, k)
    return [case for cut, case in found.items() if tiles_of(case[0], *case[1:3]) * math.ceil(case[3] / 128) < 2**15]


# --- int32 ----------------------------------------------------------------------------------------------------------


@FORM
@CHIP
def test_no_offset_of_the_kernels_exceeds_int32_where_dispatch_uses_them(processors: int, packed: bool) -> None:
    """They compute in 64 bits where the result, x, scales of canonical weights and sums of parts are concerned. What is
    left are words of the weight, rows of x for ``direct`` and the row of blocks that programs of ``wide`` share.
    """
    for n, k in itertools.product((*N, 524288, 65536 * 128 - 1), (*K[packed], 2**20)):
        words = math.prod(packing.packed_shape(n, k)) if packed else n * k
        if words >= 2**31:
            continue  # dequantized as a whole
        for m in EDGES:
            chosen = plan(m, n, k, processors, packed)
            programs = tiles_of(chosen, m, n) + split_of(chosen, m, n) * (getattr(chosen, "parts", 1) - 1)
            assert programs < 2**31
            if isinstance(chosen, Direct):
                assert chosen.rows * max(n, k // 2 + 128 * chosen.warps) < 2**31
            elif isinstance(chosen, Wide):
                assert chosen.programs * chosen.shared * math.ceil(k / 128) < 2**31
