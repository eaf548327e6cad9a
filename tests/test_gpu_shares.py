"""How the programs of the kernel ``wide`` share the tiles of a result: every block once, and nobody waits for ever."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from operator import attrgetter
from types import SimpleNamespace
from typing import NamedTuple

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import launches
from planning import CHIP, EDGES, K, N, check_each_block_once, tiles_of

from mxfp8_ops.gpu import partial_sums, shares
from mxfp8_ops.gpu.plans import SHARE, Wide, candidates

LEAST: int = shares.LEAST.value
STORING: int = partial_sums.STORING.value
FIRST, WHOLE, LAST = shares.FIRST.value, shares.WHOLE.value, shares.LAST.value


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of ``shares`` in Python."""
    gluon = SimpleNamespace(minimum=min, where=lambda condition, one, other: one if condition else other)
    monkeypatch.setattr(shares, "gl", gluon)
    for name, value in {"LEAST": LEAST, "FIRST": FIRST, "WHOLE": WHOLE, "LAST": LAST}.items():
        monkeypatch.setattr(shares, name, value)
    monkeypatch.setattr(shares, "STORING", STORING)
    monkeypatch.setattr(shares, "part_begins", partial_sums.part_begins.fn)
    monkeypatch.setattr(shares, "share_begins", shares.share_begins.fn)
    monkeypatch.setattr(shares, "pieces_of", shares.pieces_of.fn)


class Piece(NamedTuple):
    program: int
    n: int
    tile: int
    first: int
    count: int
    part: int


class Work(NamedTuple):
    """So many programs, tiles, whole ones among them, and blocks of a tile."""

    programs: int
    tiles: int
    whole: int
    blocks: int

    def of(self, program: int) -> tuple[int, ...]:
        return shares.work_of.fn(program, self.programs, self.tiles, self.whole, self.blocks)

    def pieces(self) -> Iterator[Piece]:
        for program in range(self.programs):
            work = self.of(program)
            for n in range(shares.pieces_of(work)):
                found = shares.piece_of.fn(n, program, self.programs, self.whole, self.blocks, work)
                yield Piece(program, n, *found)


def some() -> Iterator[Work]:
    """Less than a tile for each program, more, and rounds of whole tiles before; and nothing to share."""
    for programs in (1, 2, 7, 50, 132):
        for blocks in (1, 2, 3, 6, 8, 9, 16, 32, 33, 112):
            counts = sorted({1, programs - 1, programs, programs + 1, 2 * programs + 3, 4 * programs - 1} - {0})
            for tiles in counts:
                yield Work(min(programs, tiles), tiles, tiles, blocks)
            for shared in range(1, 2 * programs):
                if shared * blocks >= SHARE * programs and blocks >= 2 * LEAST:
                    for whole in (0, 2 * programs):
                        yield Work(programs, whole + shared, whole, blocks)


def short() -> Iterator[Work]:
    """Shares that are shorter than those of plans, with which the sanitizer's cases run."""
    for programs, blocks in itertools.product((2, 8, 9), (8, 9)):
        for shared in range(1, 2 * programs):
            if programs < shared * blocks < SHARE * programs:
                yield Work(programs, shared, 0, blocks)


def test_programs_compute_every_block_of_every_tile_once() -> None:
    for work in some():
        assert min(check_blocks(work)) >= min(LEAST, work.blocks), work


def check_blocks(work: Work) -> list[int]:
    """That every block of every tile is in one piece; gives how many blocks pieces have."""
    pieces = [(piece.tile, piece.first, piece.count) for piece in work.pieces()]
    check_each_block_once(pieces, work.tiles, work.blocks)
    return [count for *_, count in pieces]


def test_shares_may_be_so_short_that_some_programs_have_nothing_to_do() -> None:
    idle = 0
    for work in short():
        assert min(check_blocks(work)) >= 1, work
        check_sums(work)
        idle += work.programs - len({piece.program for piece in work.pieces()})
    assert idle > 0


def test_every_program_has_something_to_do_if_shares_are_as_long_as_those_of_plans() -> None:
    for work in some():
        if work.whole < work.tiles and (work.tiles - work.whole) * work.blocks >= SHARE * work.programs:
            assert {piece.program for piece in work.pieces()} == set(range(work.programs)), work


def test_a_share_is_as_much_as_any_other_but_for_what_makes_parts_long_enough() -> None:
    for work in some():
        if work.whole < work.tiles:
            rounds = work.whole // work.programs
            done = Counter(dict.fromkeys(range(work.programs), 0))
            for piece in work.pieces():
                done[piece.program] += piece.count
            even = (work.tiles - work.whole) * work.blocks / work.programs
            for blocks in done.values():
                assert abs(blocks - rounds * work.blocks - even) < 2 * LEAST, work


def test_the_last_of_equal_parts_is_longer_by_what_the_others_take_to_store_theirs() -> None:
    for parts, blocks in itertools.product((2, 3, 4, 8), (32, 33, 64, 112)):
        for tiles in (1, 5, 16):
            counts = defaultdict(list)
            for piece in Work(parts * tiles, tiles, 0, blocks).pieces():
                counts[piece.tile].append(piece.count)
            assert len(counts) == tiles
            for found in counts.values():
                assert len(found) == parts
                assert max(found[:-1]) - min(found[:-1]) <= 1
                assert 1 <= found[-1] - max(found[:-1]) <= STORING + 1


def test_whoever_ends_a_tile_adds_what_was_stored_for_it_and_nothing_else() -> None:
    for work in some():
        check_sums(work)


def check_sums(work: Work) -> None:
    stored = defaultdict(list)
    for piece in work.pieces():
        if piece.part == FIRST:
            assert piece.first + piece.count < work.blocks
            stored[piece.tile].append(piece.program)
    ended = [piece for piece in work.pieces() if piece.part == LAST]
    assert sorted(piece.tile for piece in ended) == sorted(stored)
    for piece in ended:
        assert piece.first + piece.count == work.blocks
        shared, mine = work.tiles - work.whole, work.of(piece.program)
        assert mine[1:3] == (piece.tile - work.whole, piece.first)  # by which first_of_tile goes
        first = shares.first_of_tile.fn(piece.program, work.programs, shared, work.blocks, mine)
        assert list(range(first, piece.program)) == stored[piece.tile]


def test_programs_say_that_sums_are_stored_before_they_wait_for_others() -> None:
    """Those that store any, after they have stored them; and they wait in their last piece."""
    for work in some():
        for program, pieces in itertools.groupby(work.pieces(), attrgetter("program")):
            mine = list(pieces)
            said = shares.when_to_say.fn(work.of(program))
            stores = [piece.n for piece in mine if piece.part == FIRST]
            assert (said >= 0) == bool(stores)
            for n in stores:
                assert n <= said <= len(mine) - 1
            assert all(piece.n == len(mine) - 1 for piece in mine if piece.part == LAST)


def test_no_tile_is_shared_by_more_than_two_where_there_is_one_for_each() -> None:
    for work in some():
        if work.tiles - work.whole >= work.programs:
            parts = Counter(piece.tile for piece in work.pieces())
            assert max(parts.values()) <= 2, work


@CHIP
def test_what_is_launched_is_what_plans_say(processors: int) -> None:
    """Whole tiles go round before others are shared, by programs that all have memory for their sums."""
    for m in EDGES:
        for n in N:
            for k in K[True]:
                for plan in candidates(m, n, k, processors):
                    if isinstance(plan, Wide) and m * n <= 2**26:
                        (launch,) = launches(plan, m, n, k)
                        named, tiles = launch.named, tiles_of(plan, m, n)
                        assert (named["tiles"], named["whole"]) == (tiles, tiles - plan.shared)
                        assert launch.grid == (plan.programs if plan.shared else min(processors, tiles),)
                        assert plan.programs <= processors
                        if plan.shared:
                            size = plan.rows * plan.columns
                            assert named["partial"].numel() * 4 == plan.programs * (4 * size + 8)
                            assert math.ceil(k / 128) >= 2 * LEAST
