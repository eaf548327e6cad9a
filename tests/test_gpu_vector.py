"""The kernel for one row of x on a weight as it is stored, simulated on the CPU. What is compiled of it is in
tests/test_gpu_kernels.py, results on a chip with those of all kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor

from mxfp8_ops import reference

pytest.importorskip("triton.experimental.gluon")

from compiling import one_code_a_row, what_codes_mean
from simulating import DTYPE, GLUON, Pointer, in_python, linear_layout

from mxfp8_ops.gpu import fragments, vector
from mxfp8_ops.gpu import places as numbers
from mxfp8_ops.gpu.gemv import FAST_SCALES


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    gluon = SimpleNamespace(**GLUON)
    for module in (fragments, numbers, vector):
        in_python(monkeypatch, module, gluon)
    return gluon


def computed(
    gluon: SimpleNamespace, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, warps: int
) -> Tensor:
    """What the kernel computes, program by program, with all tensors at the very end of their memory."""
    n, k = weight.shape
    out = torch.full((1, n), torch.nan, dtype=x.dtype)
    tensors = (x.view(torch.int32), weight.view(torch.int32), scale, x if bias is None else bias, out)
    for program in range(-(-n // 4)):
        gluon.program_id = lambda _, program=program: torch.tensor(program)
        pointers = map(Pointer, tensors)
        vector.mxfp8_linear_vector(*pointers, n, k, warps, *FAST_SCALES[x.dtype], bias is not None, n % 4 != 0)
    return out


@DTYPE
@pytest.mark.parametrize(
    ("n", "k", "warps"),
    [(1, 32, 1), (7, 96, 2), (33, 288, 1), (130, 1056, 2), (9, 1024, 1), (16, 2080, 2), (17, 4128, 2), (8, 4096, 4)],
)
def test_vector_computes_linear_for_any_shape_and_reads_nothing_else(
    simulated: SimpleNamespace, dtype: torch.dtype, n: int, k: int, warps: int
) -> None:
    x, weight, scale, bias = exact_linear_inputs(1, n, k, dtype)
    for offset in (bias, None):
        actual = computed(simulated, x, weight, scale, offset, warps)
        assert_same(actual, reference.linear(x, weight, scale, offset))
    scale[-1, -1] = 255  # the last program computes its outputs once more
    actual = computed(simulated, x, weight, scale, bias, warps)
    assert_same(actual, reference.linear(x, weight, scale, bias))


@DTYPE
@pytest.mark.parametrize("special", [False, True], ids=["fast", "exact"])
def test_vector_decodes_every_element(
    simulated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, special: bool
) -> None:
    """Under scales where something changes, and some in between: under 105 and 111 float16 rounds elements, as it does
    in real weights. Without scales that are far from these nothing is computed twice.
    """
    lowest, highest = FAST_SCALES[dtype]
    scales = (0, lowest - 1, highest + 1, 255) if special else (lowest, lowest + 1, 105, 111, 127, highest - 20)
    if not special:
        monkeypatch.setattr(vector, "_exact_products", None)
    weight, scale = one_code_a_row(scales, 32, nan=special)
    actual = computed(simulated, torch.ones(1, 32, dtype=dtype), weight, scale, None, 1)
    assert_same(actual[0], what_codes_mean(weight, scale, dtype))


@pytest.mark.parametrize("warps", [1, 2, 4])
def test_every_warp_adds_up_the_sums_of_all_lanes_without_bank_conflicts(warps: int) -> None:
    found = linear_layout(vector._in_each_warp.fn(32 * warps), [4, 32 * warps])
    taken = [*found.reg_bases, *found.lane_bases]
    assert sorted(taken) == sorted([[1, 0], [2, 0], *([0, 1 << i] for i in range(5 + warps.bit_length() - 1))])
    assert found.reg_bases[:2] == [[0, 1], [0, 2]]  # 16 bytes
    assert found.lane_bases[:3] == [[0, 4], [0, 8], [0, 16]]  # of eight lanes: all banks, each once
    assert found.warp_bases == [[0, 0]] * (warps.bit_length() - 1)
