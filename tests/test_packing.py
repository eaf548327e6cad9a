"""The packed layout: where every bit lands, that none is lost, and when exact decoding is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same
from torch import Tensor
from torch.utils._pytree import tree_leaves

import mxfp8_ops
from mxfp8_ops import packing

SHAPES = tuple(itertools.product((1, 7, 64, 65, 130), (32, 96, 128, 160, 288)))
every_shape = pytest.mark.parametrize(("n", "k"), SHAPES)
each_dtype = pytest.mark.parametrize("dtype", packing.PACKED_FOR, ids=["for bfloat16", "for float16"])


def random_codes(n: int, k: int) -> tuple[Tensor, Tensor]:
    """``weight [n, k]`` and ``scale [n, k/32]`` of any bytes."""
    generator = torch.Generator().manual_seed(1009 * n + k)
    weight, scale = (torch.randint(256, (n, width), dtype=torch.uint8, generator=generator) for width in (k, k // 32))
    return weight.view(torch.float8_e4m3fn), scale


def flags(packed: Tensor) -> list[int]:
    """Whether bfloat16 and whether float16 need exact decoding; the rest of what follows the blocks must be zero."""
    bfloat16, float16, *others = packed[len(packed) // 132 * 132 :].flatten().tolist()
    assert not any(others)
    return [bfloat16, float16]


def strided(matrix: Tensor) -> Iterator[Tensor]:
    """The same values under other strides."""
    yield matrix.t().contiguous().t()
    wide = matrix.new_empty(matrix.shape[0], 2 * matrix.shape[1])
    wide[:, ::2] = matrix
    yield wide[:, ::2]
    yield matrix.repeat_interleave(2, 0)[::2]


def strided_weights(weight: Tensor) -> Iterator[Tensor]:
    return (codes.view(weight.dtype) for codes in strided(weight.view(torch.uint8)))


def assert_all_same(actual: Any, expected: Any) -> None:
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_same(a, e)


# --- nothing is lost -----------------------------------------------------------------------------------


@each_dtype
def test_every_element_under_every_scale_comes_back(dtype: torch.dtype) -> None:
    weight, scale = all_codes()
    assert_all_same(mxfp8_ops.unpack(mxfp8_ops.pack(weight, scale, dtype), 256, 256), (weight, scale))


@each_dtype
@every_shape
def test_every_shape_comes_back_bit_for_bit(n: int, k: int, dtype: torch.dtype) -> None:
    weight, scale = random_codes(n, k)
    packed = mxfp8_ops.pack(weight, scale, dtype)
    more = {torch.bfloat16: 1, torch.float16: 2}[dtype]
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (132 * -(-n // 128) * -(-k // 128) + more, 32))
    assert packing.packed_for(packed) == dtype
    assert_all_same(mxfp8_ops.unpack(packed, n, k), (weight, scale))


def test_any_strides_and_e8m0_scales_are_packed_to_the_same_bits() -> None:
    for n, k in ((7, 96), (128, 256)):
        weight, scale = random_codes(n, k)
        packed = mxfp8_ops.pack(weight, scale)
        assert_same(mxfp8_ops.pack(weight, scale.view(torch.float8_e8m0fnu)), packed)
        for elements, scales in itertools.product(strided_weights(weight), strided(scale)):
            assert_same(mxfp8_ops.pack(elements, scales), packed)


def test_bytes_at_any_address_are_packed_to_the_same_bits() -> None:
    weight, scale = random_codes(130, 160)
    packed = mxfp8_ops.pack(weight, scale)
    for offset in range(1, 8):
        elements, scales = (
            torch.empty(matrix.numel() + offset, dtype=torch.uint8)[offset:].view(matrix.shape).copy_(matrix)
            for matrix in (weight.view(torch.uint8), scale)
        )
        assert_same(mxfp8_ops.pack(elements.view(weight.dtype), scales), packed)


def test_a_packed_tensor_under_other_strides_is_unpacked() -> None:
    weight, scale = random_codes(130, 160)
    for packed in strided(mxfp8_ops.pack(weight, scale)):
        assert_all_same(mxfp8_ops.unpack(packed, 130, 160), (weight, scale))


def test_packing_takes_the_bytes_of_weight_and_scale_and_128_more() -> None:
    weight, scale = random_codes(256, 384)
    assert mxfp8_ops.pack(weight, scale).nbytes == weight.nbytes + scale.nbytes + 128
    assert mxfp8_ops.pack(weight, scale, torch.float16).nbytes == weight.nbytes + scale.nbytes + 256


def test_inputs_are_left_alone_and_results_are_new() -> None:
    weight, scale = random_codes(128, 128)
    packed = mxfp8_ops.pack(weight, scale)
    given = weight, scale, packed
    before = [(t.clone(), t._version) for t in given]
    assert_same(mxfp8_ops.pack(weight, scale), packed)
    results = mxfp8_ops.unpack(packed, 128, 128)
    for tensor, (value, version) in zip(given, before, strict=True):
        assert_same(tensor, value)
        assert tensor._version == version
    storages = [t.untyped_storage().data_ptr() for t in (weight, scale, packed, *results)]
    assert len(set(storages)) == 5


@each_dtype
def test_work_in_parts_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = random_codes(520, 160)
    codes = weight.view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scale.clamp_(100, 130)
    for row in (None, 0, 519):  # one NaN, in the first or in the last part
        if row is not None:
            codes[row, 150] = 0x7F
        packed = mxfp8_ops.pack(weight, scale, dtype)
        for blocks in (1, 2, 4):  # of two along K: a part is half the columns, all of them, or more rows
            with monkeypatch.context() as patch:
                patch.setattr(packing, "_CHUNK", blocks * 128 * 128)
                assert_same(mxfp8_ops.pack(weight, scale, dtype), packed)
                assert_all_same(mxfp8_ops.unpack(packed, 520, 160), (weight, scale))
        assert flags(packed) == ([0, 0] if row is None else [1, 1])
        if row is not None:
            codes[row, 150] = 0


# --- the layout ----------------------------------------------------------------------------------------


def from_bits(*bits: Tensor) -> Tensor:
    """The number with these bits, the slowest first."""
    number = torch.zeros_like(bits[0])
    for bit in bits:
        number = 2 * number + bit
    return number


def places(down: int, across: int) -> tuple[Tensor, Tensor]:
    """Where the word of every element and the word of every scale is, ``[rows, columns]``, as the docstring of
    ``packing`` says.
    """
    row, column = torch.meshgrid(torch.arange(128 * down), torch.arange(128 * across), indexing="ij")
    block = (row // 128 * across + column // 128) * 132 * 32
    r, c = [row >> i & 1 for i in range(7)], [column >> i & 1 for i in range(7)]
    words = block + from_bits(c[6], r[6], c[5], r[5], r[4], r[2], r[1], r[0], c[2], c[1], c[4], c[3])
    scales = block + 128 * 32 + from_bits(r[6], r[5], r[4], r[2], r[1], r[0], r[3])
    return words, scales[:, ::32]


def in_place(
    words: Tensor, row: Tensor, column: Tensor, neighbours: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """Elements where a bfloat16 or a float16 has them, by the operations that ``interleaving`` names."""
    lower, upper = row & 8 == 0, column & 8 != 0
    if dtype == torch.float16:
        return words.where(lower, (words << 7) ^ (words << 1))
    first, second = neighbours
    both = sum((first >> 8 + i & 0xFF) << i | (second >> i & 0xFF) << 8 + i for i in (0, 16))
    others = (first << 4).where(~upper, second >> 4 | second << 28) ^ both
    return words.where(lower, others)


@each_dtype
@every_shape
def test_every_bit_lies_where_the_layout_says(n: int, k: int, dtype: torch.dtype) -> None:
    weight, scale = random_codes(n, k)
    packed = mxfp8_ops.pack(weight, scale, dtype).flatten().long() & 0xFFFFFFFF
    place, scale_place = places(-(-n // 128), -(-k // 128))
    row, column = torch.meshgrid(*(torch.arange(length) for length in place.shape), indexing="ij")
    neighbours = packed[place[:, column[0] & ~8]], packed[place[:, column[0] | 8]]
    half = in_place(packed[place], row, column, neighbours, dtype) >> 16 * (column & 1)
    found = half >> 8 & 0x80 | half >> (4 if dtype == torch.bfloat16 else 7) & 0x7F
    expected = torch.zeros_like(found)
    expected[:n, :k] = weight.view(torch.uint8)
    assert_same(found, expected)
    found = packed[scale_place] >> 8 * (torch.arange(scale_place.shape[1]) % 4) & 0xFF
    expected = torch.full_like(found, 127)
    expected[:n, : k // 32] = scale
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("row", "column", "place", "words"),
    [
        (0, 0, (0, 0), (0x000087F8, 0x00007807)),  # sign, exponent and mantissa as in a bfloat16, and what is mixed
        (8, 0, (0, 0), (0x0000080F, 0x00007007)),
        (0, 1, (0, 0), (0x87F80000, 0x78070000)),
        (8, 1, (0, 0), (0x080F0000, 0x70070000)),
        (0, 8, (0, 0), (0x00007807, 0x000887F0)),  # the four words of a lane
        (8, 8, (0, 0), (0x00007007, 0x00087800)),
        (8, 9, (0, 0), (0x70070000, 0x78000008)),
        (0, 16, (0, 2), (0x000087F8, 0x00007807)),
        (0, 2, (0, 4), (0x000087F8, 0x00007807)),  # the four lanes of a row
        (1, 0, (0, 16), (0x000087F8, 0x00007807)),
        (16, 0, (4, 0), (0x000087F8, 0x00007807)),
        (0, 32, (16, 0), (0x000087F8, 0x00007807)),
        (64, 0, (32, 0), (0x000087F8, 0x00007807)),
        (0, 64, (64, 0), (0x000087F8, 0x00007807)),
        (0, 128, (132, 0), (0x000087F8, 0x00007807)),  # the next block along K, then the next rows
        (128, 0, (264, 0), (0x000087F8, 0x00007807)),
    ],
)
def test_single_elements_land_where_the_kernels_expect_them(
    row: int, column: int, place: tuple[int, int], words: tuple[int, int]
) -> None:
    weight = torch.zeros(256, 256, dtype=torch.uint8)
    scale = torch.zeros(256, 8, dtype=torch.uint8)
    weight[row, column] = 0xFF
    packed = mxfp8_ops.pack(weight.view(torch.float8_e4m3fn), scale)
    first, second = place, (place[0], place[1] + 1)
    assert packed[:-1].nonzero().tolist() == [list(first), list(second)]
    assert tuple(packed[at].item() & 0xFFFFFFFF for at in (first, second)) == words


@pytest.mark.parametrize(
    ("row", "block", "place", "word"),
    [
        (0, 0, (128, 0), 0x000000FF),
        (0, 3, (128, 0), 0xFF000000),
        (8, 1, (128, 1), 0x0000FF00),
        (1, 0, (128, 2), 0x000000FF),
        (16, 2, (128, 16), 0x00FF0000),
        (127, 0, (131, 31), 0x000000FF),
        (0, 4, (260, 0), 0x000000FF),
    ],
)
def test_single_scales_land_where_the_kernels_expect_them(
    row: int, block: int, place: tuple[int, int], word: int
) -> None:
    scale = torch.zeros(256, 8, dtype=torch.uint8)
    scale[row, block] = 0xFF
    packed = mxfp8_ops.pack(torch.zeros(256, 256).to(torch.float8_e4m3fn), scale)
    assert packed[:-1].nonzero().tolist() == [list(place)]
    assert packed[place].item() & 0xFFFFFFFF == word


def test_padding_is_zero_under_scale_127() -> None:
    weight, scale = random_codes(7, 96)
    packed = mxfp8_ops.pack(weight, scale)
    elements, scales = mxfp8_ops.unpack(packed, 128, 128)
    padded = torch.zeros(128, 128, dtype=torch.uint8), torch.full((128, 4), 127, dtype=torch.uint8)
    padded[0][:7, :96], padded[1][:7, :3] = weight.view(torch.uint8), scale
    assert_all_same((elements.view(torch.uint8), scales), padded)


# --- exact decoding ------------------------------------------------------------------------------------

ZERO, MINUS_ZERO, SMALLEST, LARGEST, NAN, MINUS_NAN = 0x00, 0x80, 0x01, 0xFE, 0x7F, 0xFF


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(1, 32), (7, 96), (130, 160)])
@pytest.mark.parametrize("element", [ZERO, MINUS_ZERO, SMALLEST, LARGEST, NAN, MINUS_NAN])
def test_exact_decoding_is_asked_for_exactly_when_it_is_needed(
    element: int, n: int, k: int, dtype: torch.dtype
) -> None:
    nan, nonzero = element in (NAN, MINUS_NAN), element not in (ZERO, MINUS_ZERO)
    row, column = (5 * n) // 7, k - 7
    for scale_byte in range(256):
        weight = torch.zeros(n, k, dtype=torch.uint8)
        scale = torch.full((n, k // 32), 127, dtype=torch.uint8)
        weight[row, column], scale[row, column // 32] = element, scale_byte
        bfloat16 = nan or scale_byte > 134
        float16 = bfloat16 or (nonzero and scale_byte < 95)
        packed = mxfp8_ops.pack(weight.view(torch.float8_e4m3fn), scale, dtype)
        assert flags(packed) == [bfloat16, float16] == list(packing.exact_marks(packed)), scale_byte


@every_shape
def test_padding_never_asks_for_exact_decoding(n: int, k: int) -> None:
    weight = torch.full((n, k), LARGEST, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.full((n, k // 32), 127, dtype=torch.uint8)
    for lowest_or_highest in (95, 134):
        assert flags(mxfp8_ops.pack(weight, scale.fill_(lowest_or_highest))) == [0, 0]
    assert flags(mxfp8_ops.pack(weight, scale.fill_(94))) == [0, 1]
    assert flags(mxfp8_ops.pack(torch.zeros_like(weight.view(torch.uint8)).view(weight.dtype), scale)) == [0, 0]
    assert flags(mxfp8_ops.pack(weight, scale.fill_(135))) == [1, 1]
