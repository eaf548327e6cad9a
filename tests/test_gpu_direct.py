"""The kernel for very few rows of x, without a Hopper chip: compiled for one, and simulated on the CPU. Results on the
chip itself are in tests/test_gpu_packed*.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor

from mxfp8_ops import packing, reference

pytest.importorskip("triton.experimental.gluon")

from compiling import check_loops, check_waits, compiled_at_an_end, what_codes_mean
from simulating import DTYPE, DTYPES, Pointer, packed_codes, places, simulate

from mxfp8_ops.gpu import direct, lanes, plans_few
from mxfp8_ops.gpu.kinds_few import Direct

KINDS = [*plans_few.FOUR, *plans_few.EIGHT]
KIND = pytest.mark.parametrize("kind", KINDS, ids=repr)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return simulate(monkeypatch)


@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, DTYPES * len(KINDS), strict=False)), ids=repr)
def test_it_compiles_and_reads_16_bytes_at_a_time(kind: Direct, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each kind in one of the dtypes: kernels take long to compile."""
    found = compiled_at_an_end(kind, True, dtype, tmp_path)
    assert found.registers <= kind.registers
    assert re.search(r"ld\.global\S*evict_first\S*\.v4", found.ptx)
    assert len(re.findall(r"bar\.sync|barrier\.sync", found.ptx)) == 1, "only between storing sums and adding them up"
    check_waits(found)
    check_loops(tmp_path, 2, 8)


@KIND
def test_sums_of_warps_are_stored_and_read_without_bank_conflicts(kind: Direct) -> None:
    """A lane of the matrix instruction stores two sums next to each other, so 16 lanes at a time, and reads one."""
    sizes = kind.rows, kind.tiles, kind.warps
    shape = (kind.warps, kind.tiles * 16, kind.rows * 2)
    place = places(lanes._sums_in_memory.fn(*sizes).offset_bases, shape)
    for warp in range(kind.warps):
        for row in range(0, shape[1], 4):
            for column in range(0, shape[2], 8):
                together = place[warp, row : row + 4, column : column + 8].flatten()
                assert len((together % 32).unique()) == 32
    found = lanes._sums_in_lanes.fn(*sizes)
    for others in combinations(found.reg_bases + found.warp_bases):
        together = [place[added(others, lane)] for lane in combinations(found.lane_bases)]
        assert len({int(at) % 32 for at in together}) == 32


@KIND
def test_every_sum_is_read_once_and_both_groups_and_all_warps_of_it_by_lanes_that_exchange_it(
    kind: Direct,
) -> None:
    found = lanes._sums_in_lanes.fn(kind.rows, kind.tiles, kind.warps)
    every = {
        added(a, b) for a in combinations(found.reg_bases + found.warp_bases) for b in combinations(found.lane_bases)
    }
    assert len(every) == kind.warps * kind.tiles * 16 * kind.rows * 2
    assert found.reg_bases[:2] == [[0, 4, 0], [0, 0, 4]]  # k5 of the weight's row and of x's column
    warps = kind.warps.bit_length() - 1
    assert found.lane_bases[:warps] == [[1 << i, 0, 0] for i in range(warps)]


def combinations(bases: list[list[int]]) -> list[tuple[int, ...]]:
    """Where the numbers 0, 1, 2, ... of a register, lane or warp are."""
    found: list[tuple[int, ...]] = [(0, 0, 0)]
    for basis in bases:
        found += [added(each, tuple(basis)) for each in found]
    return found


def added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a ^ b for a, b in zip(one, other, strict=True))


def directly(gluon: SimpleNamespace, x: Tensor, packed: Tensor, n: int, bias: Tensor | None, plan: Direct) -> Tensor:
    """What ``direct.mxfp8_linear_direct`` computes, program by program, with x at the very end of its memory."""
    m, k = x.shape
    out = torch.full((m, n), torch.nan, dtype=x.dtype)
    pointers = (x.contiguous().view(torch.int32), packed, x if bias is None else bias, out)
    ragged = k % (128 * plan.warps * plan.blocks) != 0
    constants = (*plan.constants, ragged, packing.packed_for(packed) == torch.float16, bias is not None)
    for program in range(plan.programs(n)):
        gluon.program_id = lambda _, program=program: program
        direct.mxfp8_linear_direct(*map(Pointer, pointers), m, n, k, *constants)
    return out


@DTYPE
def test_direct_computes_linear_for_any_shape_and_reads_nothing_else(
    simulated: SimpleNamespace, dtype: torch.dtype
) -> None:
    for m, n, k in (
        (1, 1, 32),
        (2, 7, 96),
        (3, 33, 288),
        (8, 130, 1056),
        (5, 17, 4128),
        (4, 40, 2048),
        (3, 20, 800),
        (8, 9, 1824),
    ):
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        packed = packing.pack(weight, scale, dtype=dtype)
        rows = 4 if m <= 4 else 8
        for plan, offset in ((Direct(rows, 1, 4, 2), bias), (Direct(rows, 2, 8, 1), None)):
            actual = directly(simulated, x, packed, n, offset, plan)
            assert_same(actual, reference.linear(x, weight, scale, offset))


@DTYPE
@pytest.mark.parametrize("packed_for", packing.PACKED_FOR)
@pytest.mark.parametrize("special", [False, True], ids=["fast", "exact"])
def test_direct_decodes_every_element(
    simulated: SimpleNamespace, dtype: torch.dtype, special: bool, packed_for: torch.dtype
) -> None:
    """In the last of two turns, or of three if decoding is exact, one of four warps has nothing to do, and one has a
    quarter of a block.
    """
    k = 1312  # ten blocks and a quarter: eight at once, then one a warp; exactly, always one a warp
    weight, scale, packed = packed_codes(k, dtype, packed_for, special)
    actual = directly(simulated, torch.ones(1, k, dtype=dtype), packed, len(weight), None, Direct(4, 2, 4, 2))
    assert_same(actual[0], what_codes_mean(weight, scale, dtype))
