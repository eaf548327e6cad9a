"""The C functions of every level that this machine can run: the reference's bits, and no byte beyond the inputs."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cpu_calls import DTYPES, LEVELS, Calls, calls
from helpers import all_codes, assert_same, bits, exact_linear_inputs, float64_values, scaled
from torch import Tensor

from mxfp8_ops import reference

RULES = ("floor", "rceil")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Calls:
    return calls(request.param)


# --- every code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequant_of_every_code_has_the_bits_of_the_reference(level: Calls, dtype: torch.dtype) -> None:
    weight, scale = all_codes()
    for blocks in (8, 5):  # pairs of blocks, and one that is left
        codes, scales = weight[:, : 32 * blocks].contiguous(), scale[:, :blocks].contiguous()
        out = torch.empty(codes.shape, dtype=dtype)
        assert_same(level.dequant(codes, scales, out), reference.dequant(codes, scales, dtype))


@pytest.mark.parametrize(("code", "dtype"), [(3, torch.bfloat16), (4, torch.float16)])
def test_dequant_gives_the_values_of_a_short_dtype_in_float32(level: Calls, code: int, dtype: torch.dtype) -> None:
    weight, scale = all_codes()
    out = torch.empty(weight.shape)
    level.library.mxfp8_dequant(weight.data_ptr(), scale.data_ptr(), out.data_ptr(), scale.numel(), code, 2)
    assert_same(out, reference.dequant(weight, scale, dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequant_of_much_is_the_same_past_the_caches(level: Calls, dtype: torch.dtype) -> None:
    weight, scale = all_codes()
    weight, scale = weight.repeat(130, 1), scale.repeat(130, 1)  # 8.5 million
    memory = torch.zeros(weight.numel() * dtype.itemsize + 64, dtype=torch.uint8)
    expected = reference.dequant(weight, scale, dtype)
    for first in (0, dtype.itemsize):  # aligned, and not
        out = memory[first : first + weight.numel() * dtype.itemsize].view(dtype).view(weight.shape)
        assert torch.equal(bits(level.dequant(weight, scale, out)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32, 48, 64])
def test_linear_of_every_code_by_an_identity_is_dequant(level: Calls, m: int, dtype: torch.dtype) -> None:
    weight, scale = all_codes()
    values = reference.dequant(weight, scale, dtype)
    undefined = ~values.isfinite().all(1)  # 0 * inf is NaN
    for first in range(0, 256, max(m, 32)):
        expected = values[:, first : first + m].t().masked_fill(undefined, torch.nan)
        expected[values[:, first : first + m].t().isinf() & (~values.isfinite()).sum(1).eq(1)] = torch.inf
        out = level.linear(torch.eye(256, dtype=dtype)[first : first + m], weight, scale)
        assert_same(out + 0.0, expected + 0.0)  # zeros: a sum of zeros of both signs is +0


# --- linear: shapes, memory, threads -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [32, 64, 96, 288, 4128])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 33])
def test_linear_is_exact_in_every_shape(level: Calls, m: int, k: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 67, k, dtype)
    expected = reference.linear(x, weight, scale, bias)
    for n in range(1, 68):
        assert torch.equal(level.linear(x, weight[:n], scale[:n], bias[:n]), expected[:, :n]), n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 6, 7, 8, 9, 17, 48, 49, 64, 65, 113])
def test_linear_is_exact_for_every_tile_of_x(level: Calls, m: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 29, 608, dtype)
    assert_same(level.linear(x, weight, scale, bias), reference.linear(x, weight, scale, bias))
    assert_same(level.linear(x, weight, scale), reference.linear(x, weight, scale))


@pytest.mark.parametrize(("m", "n", "k"), [(65, 45, 2080), (70, 600, 1120), (257, 33, 1056)])
def test_many_rows_of_x_are_exact_in_every_part(level: Calls, m: int, n: int, k: int) -> None:
    """More of x than goes at once, more rows of the weight than take turns, and more columns than are decoded together;
    and what only the reference's way can do stays where it is.
    """
    x, weight, scale, bias = exact_linear_inputs(m, n, k, torch.bfloat16)
    weight.view(torch.uint8)[n - 1, k - 1] = 0x7F
    scale[n // 2, 1] = 255
    scale[n // 3, -1], weight.view(torch.uint8)[n // 3, -32:] = 254, 0
    assert_same(level.linear(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


def unaligned(tensor: Tensor) -> Tensor:
    """A copy that begins at an odd address."""
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_uint8 * (size + 1))()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)
    copy.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
    assert copy.data_ptr() % 2 == 1
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointers_need_no_alignment(level: Calls, dtype: torch.dtype) -> None:
    for m in (1, 3, 16, 33):
        inputs = exact_linear_inputs(m, 13, 288, dtype)
        out = unaligned(torch.zeros(m, 13, dtype=dtype))
        assert_same(level.linear(*map(unaligned, inputs), out=out), reference.linear(*inputs))
    weight, scale = map(unaligned, all_codes())
    out = unaligned(torch.zeros(256, 256, dtype=dtype))
    assert_same(level.dequant(weight, scale, out), reference.dequant(weight, scale, dtype))
    x = torch.randn(7, 96).to(dtype)
    into = unaligned(torch.zeros(7, 96, dtype=torch.uint8)).view(torch.float8_e4m3fn), unaligned(scale[:7, :3])
    for actual, expected in zip(
        level.quantize_into(unaligned(x), "rceil", *into), reference.quantize(x, "rceil"), strict=True
    ):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_x_may_be_apart(level: Calls, dtype: torch.dtype) -> None:
    for m in (1, 3, 16, 33):
        x, weight, scale, bias = exact_linear_inputs(m, 13, 288, dtype)
        wide = torch.full((m, 301), torch.nan, dtype=dtype)
        wide[:, 5:293] = x
        assert_same(level.linear(wide[:, 5:293], weight, scale, bias), reference.linear(x, weight, scale, bias))


@pytest.fixture
def guarded() -> Iterator[Callable[[Tensor], Tensor]]:
    """Makes copies whose last byte is the last that may be read or written."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    page, fences = mmap.PAGESIZE, []

    def copy(tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // page) * page
        memory = mmap.mmap(-1, pages + page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        last = whole.data_ptr() + pages
        assert libc.mprotect(last, page, 0) == 0
        fences.append(last)
        moved = whole[pages - size : pages]
        moved.copy_(tensor.contiguous().view(torch.uint8).flatten())
        return moved.view(tensor.dtype).view(tensor.shape)

    yield copy
    for fence in fences:
        libc.mprotect(fence, page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_byte_beyond_the_last_is_touched(
    level: Calls, dtype: torch.dtype, guarded: Callable[[Tensor], Tensor]
) -> None:
    for m, n, k in (
        (1, 1, 32),
        (1, 5, 96),
        (2, 3, 64),
        (3, 7, 96),
        (7, 6, 352),
        (16, 13, 96),
        (33, 9, 544),
        (50, 5, 32),
    ):
        inputs = exact_linear_inputs(m, n, k, dtype)
        out = guarded(torch.zeros(m, n, dtype=dtype))
        assert_same(level.linear(*map(guarded, inputs), out=out), reference.linear(*inputs))
        _, weight, scale, _ = inputs
        out = guarded(torch.zeros(n, k, dtype=dtype))
        assert_same(level.dequant(guarded(weight), guarded(scale), out), reference.dequant(weight, scale, dtype))
        x = torch.randn(n, k).to(dtype)
        expected = reference.quantize(x, "floor")
        into = map(guarded, expected)
        for actual, wanted in zip(level.quantize_into(guarded(x), "floor", *into), expected, strict=True):
            assert_same(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads_or_the_turn(level: Calls, dtype: torch.dtype) -> None:
    weight, scale = reference.quantize(torch.randn(515, 1056))
    for m in (1, 4, 16, 40, 70):
        x, bias = torch.randn(m, 1056).to(dtype), torch.randn(515).to(dtype)
        first = Calls(level.library, 1).linear(x, weight, scale, bias)
        for threads in (1, 2, 3, 3, 3):
            assert_same(Calls(level.library, threads).linear(x, weight, scale, bias), first)


def test_several_threads_of_python_at_once(level: Calls) -> None:
    inputs = [exact_linear_inputs(m, 67, k, dtype) for m in (1, 3, 16, 33) for k in (64, 4128) for dtype in DTYPES]
    expected = [reference.linear(*each) for each in inputs]

    def work(turn: int) -> None:
        for i in range(len(inputs)):
            i = (i + 5 * turn) % len(inputs)
            assert_same(level.linear(*inputs[i]), expected[i])
            weight, scale = inputs[i][1:3]
            out = torch.empty(weight.shape, dtype=torch.bfloat16)
            assert_same(level.dequant(weight, scale, out), reference.dequant(weight, scale))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


# --- linear: values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 16, 48, 80])
def test_error_is_no_larger_than_that_of_f_linear(level: Calls, m: int, dtype: torch.dtype) -> None:
    weight, scale = reference.quantize(torch.randn(256, 2080))
    x, bias = torch.randn(m, 2080).to(dtype), torch.randn(256).to(dtype)
    exact = x.double() @ float64_values(weight, scale).t() + bias.double()
    dense = reference.dequant(weight, scale, dtype)

    def error(out: Tensor) -> float:
        return (out.double() - exact).square().mean().sqrt().item()

    ours, theirs = error(level.linear(x, weight, scale, bias)), error(F.linear(x, dense, bias))
    # In float32 both are the errors of their orders of summation, in short dtypes that of the last rounding.
    assert ours <= theirs * (1.5 if dtype == torch.float32 else 1.001)


@pytest.mark.parametrize("m", [1, 3, 8, 24, 40, 70])
@pytest.mark.parametrize("exponent", [-133, -126, -110, -71, -70, -50, 50, 100])
def test_x_of_any_magnitude(level: Calls, m: int, exponent: int) -> None:
    """Where products of bfloat16 would be flushed to zero, they are not."""
    x, weight, scale, _ = exact_linear_inputs(m, 13, 96, torch.float32)
    x, scale = x.sign(), torch.full_like(scale, 124 if exponent > 0 else 130)
    short = scaled(x.double(), torch.tensor(exponent)).bfloat16()
    expected = (short.double() @ float64_values(weight, scale).t()).bfloat16()
    assert expected.count_nonzero() > 0
    assert_same(level.linear(short, weight, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 16, 40, 70])
def test_nan_and_infinity_in_x_stay_in_their_rows(level: Calls, m: int, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, 13, 288, dtype)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[m // 2, 100] = value
        expected = reference.linear(x, weight, scale, bias)
        assert expected[m // 2].isfinite().logical_not().all()
        assert_same(level.linear(x, weight, scale, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 24, 40, 70])
@pytest.mark.parametrize("byte", [0, 1, 86, 87, 111, 112, 134, 135, 167, 168, 255])
def test_one_block_of_another_scale_among_others(level: Calls, m: int, byte: int, dtype: torch.dtype) -> None:
    _, weight, scale, _ = exact_linear_inputs(1, 13, 288, dtype)
    scale[5, 4] = byte
    column = (128 + 17 * torch.arange(m)) % 288  # the first is in that block
    x = F.one_hot(column, 288).to(dtype)
    expected = reference.dequant(weight, scale, dtype)[:, column].t()
    expected[:, 5] += (reference.dequant(weight, scale, dtype)[5] * 0).sum()  # 0 * NaN, 0 * inf
    assert_same(level.linear(x, weight, scale) + 0.0, expected + 0.0)


def test_no_rows_and_no_work(level: Calls) -> None:
    _, weight, scale, _ = exact_linear_inputs(1, 7, 64, torch.bfloat16)
    assert level.linear(torch.empty(0, 64, dtype=torch.bfloat16), weight, scale).shape == (0, 7)


# --- quantize ----------------------------------------------------------------------------------------------


def some_blocks(dtype: torch.dtype) -> Iterator[Tensor]:
    """``[..., 32]`` of all magnitudes, rounding ties, ends of the range, and what is not finite."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(2)
    for low, high in ((-149, 120), (-12, 12)):
        exponent = torch.randint(low, high, (2048, 1), generator=generator)
        values = scaled(torch.randn(2048, 96, generator=generator), exponent)
        values = scaled(values, -torch.randint(0, 12, values.shape, generator=generator)).clamp(info.min, info.max)
        yield values.to(dtype)
        values[::3, ::7] = 0
        yield -values.to(dtype)
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = ((grid[1:] + grid[:-1]) / 2).to(dtype)
    width = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    near = torch.cat([(ties.view(width) + i).view(dtype) for i in (-1, 0, 1)])
    led = torch.full((len(near), 32), 448.0, dtype=dtype)
    led[:, 3], led[:, 9] = near, -near
    yield led
    smallest = info.smallest_normal * info.eps
    for value in (0.0, -0.0, info.max, info.min, info.smallest_normal, smallest, torch.inf, -torch.inf, torch.nan):
        block = torch.zeros(1, 32, dtype=dtype)
        block[0, 5] = value
        yield block
        yield torch.full((1, 64), value, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_quantize_has_the_bits_of_the_reference(level: Calls, rule: str, dtype: torch.dtype) -> None:
    for x in some_blocks(dtype):
        for actual, expected in zip(level.quantize(x, rule), reference.quantize(x, rule), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_quantize_of_every_value_of_a_short_dtype(level: Calls, rule: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 32)
    scattered = every.view(64, -1, 32)[torch.arange(64).flip(0)].transpose(1, 2).reshape(-1, 32)
    for x in (every, scattered):
        for actual, expected in zip(level.quantize(x, rule), reference.quantize(x, rule), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_of_much_is_the_same_past_the_caches(level: Calls, dtype: torch.dtype) -> None:
    x = torch.randn(131, 64 * 1024 + 32).to(dtype)  # 8.6 million, and a group of blocks that is not whole
    x[::9, ::5], x[70, 300] = 0, torch.nan
    weight, scale = reference.quantize(x, "rceil")
    memory = torch.zeros(x.numel() + 64, dtype=torch.uint8)
    for first in (-memory.data_ptr() % 64, 1):  # aligned, and not
        codes = memory[first : first + x.numel()].view(torch.float8_e4m3fn).view(x.shape)
        found = level.quantize_into(x, "rceil", codes, torch.zeros_like(scale))
        assert torch.equal(bits(found[0]), bits(weight))
        assert torch.equal(bits(found[1]), bits(scale))
