"""The Triton kernels, run by Triton's interpreter on the CPU. A program: the interpreter must be chosen before Triton
is imported. Its own casts are wrong for subnormal bfloat16 and float16, which tests/test_gpu.py covers instead.
"""

from __future__ import annotations

import os
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch
from helpers import all_codes, assert_same, exact_linear_inputs, expected_from_float64
from torch import Tensor

from mxfp8_ops import packing, reference
from mxfp8_ops.gpu import elementwise, gemv, portable

SHAPES = ((1, 32), (7, 96), (33, 288), (5, 1056), (4, 2048))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequant() -> None:
    weight, scale = all_codes()
    for dtype, exact in (
        (torch.float32, slice(0, 256)),
        (torch.bfloat16, slice(10, 240)),
        (torch.float16, slice(124, 134)),
    ):
        w, s = weight[exact], scale[exact]
        assert_same(elementwise.dequant(w, s, dtype, native=False), expected_from_float64(w, s, dtype))


def dequant_packed() -> None:
    """Every code under every scale, and a shape that ends within a block."""
    every = all_codes()
    ends = torch.randint(0, 127, (33, 288), dtype=torch.uint8), torch.randint(124, 134, (33, 9), dtype=torch.uint8)
    for (weight, scale), dtype in ((every, torch.float32), (ends, torch.bfloat16), (ends, torch.float16)):
        weight = weight.view(torch.float8_e4m3fn)
        for packed_for in packing.PACKED_FOR:
            packed = packing.pack(weight, scale, dtype=packed_for)
            actual = elementwise.dequant_packed(packed, *weight.shape, dtype)
            assert_same(actual, expected_from_float64(weight, scale, dtype))


def quantize() -> None:
    x = torch.randn(67, 128) * torch.logspace(-44, 38, 67)[:, None]
    x[3, 7], x[5, 40], x[6], x[7, :32] = torch.nan, torch.inf, 0, -0.0
    every = torch.arange(0x0080, 0x7F80, dtype=torch.int16).view(torch.bfloat16).unsqueeze(-1).repeat(1, 32)
    every[:, 1:] *= 0.37
    check_quantize(x)
    with patch.object(elementwise, "_BLOCKS", 32 * elementwise._BLOCKS):  # the interpreter is slow at many programs
        check_quantize(every.float())


def check_quantize(values: Tensor) -> None:
    for rule in ("rceil", "floor"):
        actual = elementwise.quantize(values, rule, native=False)
        for one, expected in zip(actual, reference.quantize(values, rule), strict=True):
            assert_same(one, expected)


def linear() -> None:
    """Every number of rows with every shape and with every dtype, and every shape with every dtype."""
    for i, m in enumerate((1, 2, 3, 5, gemv.MAX_ROWS)):
        for j, (n, k) in enumerate(SHAPES):
            x, weight, scale, bias = exact_linear_inputs(m, n, k, DTYPES[(i + j) % len(DTYPES)])
            offset = bias if m % 2 else None
            actual = gemv.linear(x, weight, scale, offset, native=False)
            assert_same(actual, reference.linear(x, weight, scale, offset))


def special() -> None:
    """Every code through linear, where scaling sums instead of elements would lose it."""
    weight, scale = all_codes()
    eye = torch.eye(256)
    for rows in (slice(0, 3), slice(127, 129), slice(245, 256)):
        expected = reference.linear(eye, weight[rows], scale[rows])
        for start in (0, 120, 252):
            actual = gemv.linear(eye[start : start + 4], weight[rows], scale[rows], None, native=False)
            assert_same(actual, expected[start : start + 4])


def packaged() -> None:
    """Without bfloat16, which the interpreter cannot multiply as matrices."""
    portable.wrap_triton = lambda kernel: kernel  # that of torch 2.11 takes no interpreted kernels
    for m, n, k in ((3, 7, 96), (9, 1, 32), (17, 70, 160), (70, 33, 288)):
        for dtype in (torch.float32, torch.float16):
            x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
            offset = bias if m % 2 else None
            actual = portable.linear(x, weight, scale, offset, False)
            assert_same(actual, reference.linear(x, weight, scale, offset))
    weight, scale = all_codes()
    eye = torch.eye(256)
    for rows in (slice(0, 3), slice(127, 129), slice(245, 256)):
        actual = portable.linear(eye[:20], weight[rows], scale[rows], None, False)
        assert_same(actual, reference.linear(eye[:20], weight[rows], scale[rows]))


if __name__ == "__main__":
    for program in (dequant, dequant_packed, quantize, linear, special, packaged):
        program()
