"""The kernel for one row of x on a packed weight, without a Hopper chip: compiled for one, and simulated on the CPU.
Results on the chip itself are in tests/test_gpu_packed*.py.
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

from compiling import check_fits, check_waits, compiled, what_codes_mean
from simulating import DTYPE, DTYPES, Pointer, packed_codes, simulate

from mxfp8_ops.gpu import plans_few, row
from mxfp8_ops.gpu.kinds_few import Row

KIND = pytest.mark.parametrize("kind", plans_few.ROW, ids=repr)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return simulate(monkeypatch)


@KIND
def test_it_asks_for_words_of_the_weight_before_it_waits_for_x(kind: Row, tmp_path: Path) -> None:
    """And reads x 16 bytes at a time when it multiplies."""
    dtype = DTYPES[kind.blocks - 1]
    found = compiled(kind, True, 4096, dtype, kind.blocks == 1, tmp_path)
    assert found.registers <= kind.registers
    check_fits(found, kind.at_once)
    check_waits(found)
    before, _, after = found.ptx.partition("bar.sync")
    assert len(re.findall(r"ld\.global\S*evict_first\S*\.v4", before)) == 2 * kind.tiles * kind.blocks  # of a turn
    fast = after.partition("st.global")[0]
    assert len(re.findall(r"ld\.shared\.v4", fast)) == 2 * 4096 // (128 * kind.warps)  # of all turns


def computed(gluon: SimpleNamespace, x: Tensor, packed: Tensor, n: int, bias: Tensor | None, kind: Row) -> Tensor:
    """What ``row.mxfp8_linear_row`` computes, program by program."""
    out = torch.full((1, n), torch.nan, dtype=x.dtype)
    pointers = (x.view(torch.int32), packed, x if bias is None else bias, out)
    constants = (*kind.constants, packing.packed_for(packed) == torch.float16, bias is not None)
    for program in range(kind.programs(n)):
        gluon.program_id = lambda _, program=program: program
        row.mxfp8_linear_row(*map(Pointer, pointers), n, x.shape[1], *constants)
    return out


@DTYPE
@pytest.mark.parametrize(
    ("kind", "n", "turns"),
    [(Row(1, 1, 4, 2), 7, 1), (Row(1, 2, 4, 1), 33, 3), (Row(1, 1, 2, 2), 130, 2), (Row(1, 2, 4, 2), 9, 2)],
    ids=repr,
)
def test_row_computes_linear_for_any_number_of_outputs_and_reads_nothing_else(
    simulated: SimpleNamespace, dtype: torch.dtype, kind: Row, n: int, turns: int
) -> None:
    k = 128 * kind.together * turns
    x, weight, scale, bias = exact_linear_inputs(1, n, k, dtype)
    packed = packing.pack(weight, scale, dtype=dtype)
    for offset in (bias, None):
        actual = computed(simulated, x, packed, n, offset, kind)
        assert_same(actual, reference.linear(x, weight, scale, offset))


@DTYPE
@pytest.mark.parametrize("packed_for", packing.PACKED_FOR)
@pytest.mark.parametrize("special", [False, True], ids=["fast", "exact"])
def test_row_decodes_every_element(
    simulated: SimpleNamespace, dtype: torch.dtype, special: bool, packed_for: torch.dtype
) -> None:
    """In both of two turns."""
    weight, scale, packed = packed_codes(512, dtype, packed_for, special)
    actual = computed(simulated, torch.ones(1, 512, dtype=dtype), packed, len(weight), None, Row(1, 2, 2, 1))
    assert_same(actual[0], what_codes_mean(weight, scale, dtype))
