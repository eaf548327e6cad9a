"""From the bytes of a weight in shared memory to operands of Hopper's matrix instruction, on the CPU: that the words
which a lane reads are the ones that its registers want, and that they are decoded to the right bits. No compiler checks
that.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import all_codes, assert_same, expected_from_float64
from torch import Tensor

from mxfp8_ops import packing, reference

pytest.importorskip("triton.experimental.gluon")

from simulating import (
    DTYPE,
    Pointer,
    Shared,
    array,
    fast_weight,
    linear_layout,
    moved_by_tma,
    places,
    simulate,
    special_weight,
    swizzled_pairs,
)
from triton.experimental.gluon import language as gl

from mxfp8_ops.gpu import canonical, fragments


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return simulate(monkeypatch)


@pytest.mark.parametrize("packed_for", packing.PACKED_FOR)
@pytest.mark.parametrize("rows", [64, 128])
def test_a_lane_reads_its_registers_of_the_matrix_instruction_16_bytes_at_a_time(
    simulated: SimpleNamespace, rows: int, packed_for: torch.dtype
) -> None:
    """The instruction takes operand A of 16 elements of K in four registers of each lane. As the PTX ISA has it, lane
    l of warp w holds rows 16 * w + l / 4 and that + 8, elements 2 * (l % 4) and the next, and both + 8.
    """
    weight, scale = fast_weight(128, 128, torch.bfloat16)
    block = packing.pack(weight, scale, dtype=packed_for)[:128]
    codes = weight.view(torch.uint8)
    for first_row in range(0, 128, rows):
        for half in range(2):
            start = half * 64 + first_row // 2
            place = places(fragments.words_layout(rows), (rows // 16, 8, 2, 2, 2, 4))
            one, other = separated(torch.tensor(moved_by_tma(block[start : start + rows // 2]))[place], packed_for)
            for thread in range(2 * rows):
                warp, lane = divmod(thread, 32)
                row, element = first_row + 16 * warp + lane // 4, 64 * half + 2 * (lane % 4)
                for k5 in range(2):
                    read = place[warp, lane // 4, k5, :, :, lane % 4].flatten().tolist()
                    assert sorted(read) == list(range(min(read), min(read) + 4))
                    assert min(read) % 4 == 0
                    for k4 in range(2):
                        for k3 in range(2):
                            k = element + 32 * k5 + 16 * k4 + 8 * k3
                            word = warp, lane // 4, k5, k4, k3, lane % 4
                            assert one[word].tolist() == codes[row, k : k + 2].tolist()
                            assert other[word].tolist() == codes[row + 8, k : k + 2].tolist()


def separated(words: Tensor, packed_for: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of two neighbours in row r, and in row r + 8: the bits that the kernel makes a bfloat16's, or a
    float16's.
    """
    found = []
    for dtype, shift, others in ((torch.bfloat16, 4, 0x780F), (torch.float16, 7, 0x407F)):
        pairs = fragments.separate(array(words.int()), 4, dtype, packed_for == torch.float16, False)
        halves = torch.stack([pair.as_subclass(Tensor).contiguous() for pair in pairs]).view(torch.int16)
        halves = halves.unflatten(-1, (-1, 2)).int()
        assert (halves & others == 0).all()
        found.append(halves >> 8 & 0x80 | halves >> shift & 0x7F)
    assert_same(found[0], found[1])
    return found[0][0], found[0][1]


@pytest.mark.parametrize("rows", [64, 128])
def test_eight_lanes_that_read_together_find_their_words_in_different_banks(rows: int) -> None:
    place = places(fragments.words_layout(rows).offset_bases, (rows // 16, 8, 2, 2, 2, 4))
    for warp in range(rows // 16):
        for k5 in range(2):
            for first in range(0, 32, 8):  # 16 bytes of eight lanes are all that the banks give at once
                lanes = range(first, first + 8)
                chunks = {int(place[warp, lane // 4, k5, 0, 0, lane % 4]) // 4 % 8 for lane in lanes}
                assert len(chunks) == 8


@DTYPE
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("packed_for", packing.PACKED_FOR)
@pytest.mark.parametrize("rows", [64, 128])
def test_a_fragment_is_the_dequantized_tile(
    simulated: SimpleNamespace, dtype: torch.dtype, exact: bool, rows: int, packed_for: torch.dtype
) -> None:
    weight, scale = special_weight(128, 128) if exact else fast_weight(128, 128, dtype)
    expected = reference.dequant(weight, scale, dtype)
    block = packing.pack(weight, scale, dtype=packed_for)
    for first in range(0, 128, rows):
        scales = Shared(block[128 + first // 32 : 128 + (first + rows) // 32].flatten().tolist())
        for half in range(2):
            start = half * 64 + first // 2
            words = Shared(moved_by_tma(block[start : start + rows // 2]))
            actual = fragments.weight_fragment(
                words, scales, half, rows, None, dtype, packed_for == torch.float16, exact
            )
            assert_same(actual.as_subclass(Tensor), expected[first : first + rows, half * 64 : half * 64 + 64])


def brought_by_tma(codes: Tensor) -> list[int]:
    """Codes ``[rows, 64]`` as words of shared memory, as TMA leaves them with a swizzle of 64 bytes."""
    chunks = codes.reshape(-1, 4, 16)
    moved = torch.empty_like(chunks)
    for row in range(len(chunks)):
        for chunk in range(4):
            moved[row, chunk ^ row // 2 % 4] = chunks[row, chunk]
    return moved.view(torch.int32).flatten().tolist()


@DTYPE
@pytest.mark.parametrize("rows", [64, 128])
def test_a_canonical_fragment_is_exact_for_every_code_under_every_scale(
    simulated: SimpleNamespace, dtype: torch.dtype, rows: int
) -> None:
    weight, scale = all_codes()
    scale = scale + 37 * torch.arange(8, dtype=torch.uint8)  # those of a row differ
    expected = reference.dequant(weight, scale, dtype)
    assert_same(expected, expected_from_float64(weight, scale, dtype))
    codes, words = weight.view(torch.uint8), scale.view(torch.int32)
    for first in range(0, 256, rows):
        for half in range(4):  # of two blocks
            k = 64 * half
            tile = Shared(brought_by_tma(codes[first : first + rows, k : k + 64]))
            scales = array(words[first : first + rows, half // 2])
            actual = canonical.canonical_fragment(tile, scales, half % 2, rows, None, dtype)
            assert_same(actual.as_subclass(Tensor), expected[first : first + rows, k : k + 64])


@pytest.mark.parametrize("rows", [64, 128])
def test_scales_of_a_tile_are_those_of_its_rows_and_past_the_end_of_the_last(
    simulated: SimpleNamespace, rows: int
) -> None:
    scales = torch.arange(200 * 3, dtype=torch.int32).view(200, 3)
    for column in range(0, 200, rows):
        places = canonical.scale_places(Pointer(scales), column, 200, 384, rows, None)
        for block in range(3):
            expected = scales[torch.arange(column, column + rows).clamp(max=199), block]
            assert_same((places + block).load().as_subclass(Tensor), expected)


@pytest.mark.parametrize("rows", [64, 128])
def test_a_canonical_tile_is_read_as_it_was_brought(rows: int) -> None:
    """In words of four codes by TMA, in pairs by the kernel: the same bytes, swizzled as it is simulated above."""
    words = linear_layout(gl.NVMMASharedLayout(64, 32, 2), [rows, 16]).offset_bases
    pairs = linear_layout(gl.NVMMASharedLayout(64, 16, 2), [rows, 32]).offset_bases
    assert pairs == swizzled_pairs(64, 16, 2)[: 10 + rows // 64]
    assert pairs == [[0, 1], *([row, 2 * word] for row, word in words)]


@pytest.mark.parametrize("rows", [64, 128])
def test_lanes_read_their_registers_of_the_matrix_instruction_from_different_banks(rows: int) -> None:
    """The layout of operand A is the one of the PTX ISA (see above), and 32 lanes that each read a pair of codes find
    them in words of shared memory that the banks give at once.
    """
    mma = gl.NVMMADistributedLayout([3, 0], [rows // 16, 1], [16, 64, 16])
    operand = linear_layout(gl.DotOperandLayout(0, mma, 2), [rows, 64])
    assert operand.reg_bases == [[0, 1], [8, 0], [0, 8], [0, 16], [0, 32]]
    assert operand.lane_bases == [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    assert operand.warp_bases == [[16 << i, 0] for i in range(rows // 64 + 1)]
    place = places(swizzled_pairs(64, 16, 2), (rows, 32))
    for first in range(0, rows, 8):
        for pair in range(0, 32, 4):  # a lane's register: two codes of K
            words = {int(place[first + lane // 4, pair + lane % 4]) // 2 for lane in range(32)}
            assert len({word % 32 for word in words}) == len(words)
