"""Every kind of the kernel for two to sixteen rows of x on a weight as it is stored, on a CUDA device: the bits of the
reference.
"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor

from mxfp8_ops import reference

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import one_code_a_row, what_codes_mean
from on_chip import SHORT, guarded, on_device

from mxfp8_ops.gpu import plans_vectors, vectors
from mxfp8_ops.gpu.kinds_few import Vectors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a Hopper chip or a later one",
    ),
]
KIND = pytest.mark.parametrize("kind", plans_vectors.COSTS, ids=repr)


def run(
    kind: Vectors, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, by_float32: bool = False
) -> Tensor:
    """Checks that nothing is written next to the result, and that all of it is."""
    write = functools.partial(vectors.run, kind, x, weight, scale, bias, by_float32=by_float32)
    return guarded(len(x), len(weight), x.dtype, write)


@SHORT
@KIND
def test_every_element_is_decoded(kind: Vectors, dtype: torch.dtype) -> None:
    """Under scales where something changes, and some in between: scales in words of four, and in bytes where K is no
    multiple of 128; in a turn and in what is left.
    """
    scales = (0, 1, 2, 95, 103, 104, 105, 113, 118, 119, 127, 142, 143, 152, 153, 245, 246, 254, 255)
    for k in (128 * kind.together + 128, 128 * kind.together + 96):
        weight, scale = one_code_a_row(scales, k)
        ones = torch.ones(kind.rows, k, dtype=dtype)
        for by_float32 in (False, True):  # as for this chip, and as for one before it
            actual = run(kind, *on_device(ones, weight, scale), None, by_float32)
            assert_same(actual.cpu(), what_codes_mean(weight, scale, dtype).expand(kind.rows, -1))


@SHORT
@KIND
def test_results_are_those_of_the_reference_for_any_shape(kind: Vectors, dtype: torch.dtype) -> None:
    """Again and again, before rows of NaN."""
    whole = 128 * kind.together
    for m in range(kind.rows // 2, kind.rows + 1):
        for n, k in ((1, 32), (7, 96), (33, 128), (289, whole + 32), (130, 3 * whole), (16, 2 * whole + 384)):
            x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
            longer = torch.cat([x, torch.full((8, k), torch.nan, dtype=dtype)]).cuda()
            there = longer[:m], *on_device(weight, scale)
            for offset in (bias, None):
                expected = reference.linear(x, weight, scale, offset)
                for _ in range(3):
                    actual = run(kind, *there, None if offset is None else offset.cuda())
                    assert_same(actual.cpu(), expected)
