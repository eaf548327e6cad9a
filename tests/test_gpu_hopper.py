"""The kernels for Hopper, on packed and on canonical weights, without such a chip: compiled for one, and simulated on
the CPU.

What no compiler checks is shown here: that the words which a lane reads are the ones that its registers of the matrix
instruction want, and that they are decoded to the right bits. Results on the chip itself are in
tests/test_gpu_packed.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs, expected_from_float64
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import packing, reference

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import (  # noqa: E402
    SHARED,
    Compiled,
    compile_for_hopper,
    launches,
    one_code_a_row,
    one_tile,
    tiled_kernels,
    what_codes_mean,
)
from triton.experimental.gluon import language as gl  # noqa: E402

from mxfp8_ops.gpu import canonical, direct, dispatch, fragments, plans  # noqa: E402

KNOWN = ("3.6", "3.7", "3.8", "3.9")
"""Versions of Triton in which the kernels must compile. With others, weights may do without them."""
CHIPS = (78, 114, 132)  # multiprocessors
DTYPES = (torch.bfloat16, torch.float16)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])


ENDS = ((4096, True, 0), (4097, False, 1))
"""Numbers of outputs, of which Triton builds on multiples of 16, whether there is a bias, and how many rows a tile
lacks: x comes in other boxes then. Not each with each dtype: kernels take long to compile.
"""


def direct_kernels() -> list[plans.Plan]:
    """Every kernel for very few rows that is chosen anywhere."""
    sizes = [(m, n, 4096, chip) for m in (1, 8) for n in (1, 1024, 4097, 14336, 28672, 151936) for chip in CHIPS]
    return sorted({plan for size in sizes if isinstance(plan := plans.plan(*size), plans.Direct)}, key=repr)


# --- compiled -------------------------------------------------------------------------------------------------------


def compiled(
    plan: plans.Plan, packed: bool, n: int, dtype: torch.dtype, bias: bool, folder: Path, less: int = 0
) -> Compiled:
    launch = launches(plan, plan.rows - less, n, 4096, dtype, bias, packed)[0]
    try:
        return compile_for_hopper(launch, folder)
    except Exception as error:
        if not triton.__version__.startswith(KNOWN) and dispatch._is_of_compiler(error):
            pytest.skip(f"Triton {triton.__version__} does not compile it, and dispatch does without")
        raise


def compiled_at_an_end(plan: plans.Plan, packed: bool, dtype: torch.dtype, folder: Path) -> Compiled:
    """At one of ENDS, another one for each dtype, and the other way round for canonical weights."""
    n, bias, less = ENDS[DTYPES.index(dtype) if packed else 1 - DTYPES.index(dtype)]
    return compiled(plan, packed, n, dtype, bias, folder, less)


@DTYPE
@pytest.mark.parametrize("kernel", direct_kernels(), ids=repr)
def test_direct_compiles_and_reads_16_bytes_at_a_time(kernel: plans.Direct, dtype: torch.dtype, tmp_path: Path) -> None:
    found = compiled_at_an_end(kernel, True, dtype, tmp_path)
    assert found.registers <= kernel.registers
    assert re.search(r"ld\.global\S*evict_first\S*\.v4", found.ptx)
    assert re.search(r"shfl\.sync\.bfly\.b32[^;]*, 16, 31,", found.ptx), "sums over lanes of both groups of K"
    check_loops(tmp_path, 2, 8)


@DTYPE
@pytest.mark.parametrize(("kernel", "at_once"), [(kind, most) for kind, _, most in plans.NARROW], ids=repr)
def test_narrow_compiles_and_as_many_run_at_once_as_its_table_says(
    kernel: plans.Narrow, at_once: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = compiled_at_an_end(kernel, True, dtype, tmp_path)
    assert found.spilled == 0
    check_fits(found, at_once)
    assert "ld.shared.v4" in found.ptx
    assert "ldmatrix" in found.ptx
    check_loads(found)


@DTYPE
@pytest.mark.parametrize("kernel", tiled_kernels(packed=True), ids=repr)
def test_kernels_on_packed_weights_compile_and_fit_a_multiprocessor(
    kernel: plans.Tiled, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = compiled_at_an_end(kernel, True, dtype, tmp_path)
    check_tiled(kernel, found, tmp_path)
    if isinstance(kernel, plans.Skinny):
        assert "ld.shared.v4" in found.ptx
        assert found.spilled <= 32
        check_loops(tmp_path, 0, 1)
    else:
        check_loops(tmp_path, 2, 8)


@DTYPE
@pytest.mark.parametrize("kernel", tiled_kernels(packed=False), ids=repr)
def test_kernels_on_canonical_weights_compile_without_spills_and_fit_a_multiprocessor(
    kernel: plans.Tiled, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = compiled_at_an_end(kernel, False, dtype, tmp_path)
    check_tiled(kernel, found, tmp_path)
    assert found.spilled == 0
    check_loops(tmp_path, 0, 0)


def check_tiled(kernel: plans.Tiled, found: Compiled, folder: Path) -> None:
    """That as many programs run at once as the model counts on, and matrix instructions do not wait for each other."""
    check_fits(found, plans.TABLE[plans._kind(kernel)].at_once)
    assert "serialized" not in found.log, found.log
    check_loads(found)


def check_fits(found: Compiled, at_once: int) -> None:
    """That so many programs fit a multiprocessor."""
    assert found.shared <= SHARED
    assert at_once * (found.shared + 1024) <= SHARED + 1024  # the system takes a KiB for each
    assert at_once * found.threads * -(-found.registers // 8) * 8 <= plans.REGISTERS


def check_loads(found: Compiled) -> None:
    """That a stage waits for the bytes which are on their way, no more and no less: for more it would wait for ever."""
    stages = loaded_bytes(found)
    assert stages
    assert all(expected == loaded for expected, loaded in stages)


def loaded_bytes(found: Compiled) -> list[tuple[int, int]]:
    """The bytes that each stage waits for, and those that TMA is told to bring to it right after."""
    stages: list[tuple[int, int]] = []
    for line in found.ttgir.splitlines():
        if "barrier_expect" in line:
            bytes_expected = re.search(r"barrier_expect %\S+, (\d+)", line)
            assert bytes_expected is not None
            stages.append((int(bytes_expected[1]), 0))
        elif "async_tma_copy_global_to_local" in line:
            box = re.search(r"-> !ttg\.memdesc<((?:\d+x)+)[a-z]+(\d+)", line)
            assert box is not None
            size = math.prod(map(int, box[1].split("x")[:-1]))
            expected, loaded = stages[-1]
            stages[-1] = expected, loaded + size * int(box[2]) // 8
    in_ptx = re.findall(r"expect_tx\.\S+ _, \[(%\w+)\], (\d+);|cp\.async\.bulk\.tensor.*\[(%\w+)\];", found.ptx)
    barrier = ""
    for waiting, _, told in in_ptx:
        barrier = waiting or barrier
        assert told in ("", barrier)  # which is the barrier that waits for it
    assert [int(expected) for _, expected, _ in in_ptx if expected] == [expected for expected, _ in stages]
    return stages


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
@pytest.mark.parametrize("m", [1, 16, 200])
def test_a_weight_of_one_row_compiles(m: int, packed: bool, tmp_path: Path) -> None:
    """Triton makes a constant of an N that is 1."""
    plan = one_tile(plans.plan(m, 1, 4096, 132, packed))
    assert compiled(plan, packed, 1, torch.bfloat16, True, tmp_path).shared <= SHARED


def fast_loops(cubin: Path) -> list[list[str]]:
    """The instructions of every loop that multiplies what it has decoded in the dtype of x: not through float32."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run([tool, "-c", "-ndf", cubin], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    places: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            places[label[1]] = len(code)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            code.append(instruction[1])
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in places:
                loops.append(code[places[back[1]] :])
    return [loop for loop in loops if _has(loop, "HMUL2") and _has(loop, "MMA") and not _has(loop, "FMUL")]


def _has(loop: list[str], instruction: str) -> bool:
    return any(instruction in line for line in loop)


def check_loops(folder: Path, stored: int, loaded: int) -> None:
    """That there are loops that decode fast, and how often at most they store to local memory and load from there.
    What is kept there was mostly stored before: the loop only reads it again.
    """
    loops = fast_loops(folder / "kernel.cubin")
    assert loops, "no loop decodes fast"
    for loop in loops:
        assert sum("STL" in line for line in loop) <= stored
        assert sum("LDL" in line for line in loop) <= loaded


# --- simulated: what a lane reads -----------------------------------------------------------------------------------


def special_weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Random bytes, NaN elements and scales of every size among them."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn), torch.randint(0, 256, (n, k // 32), dtype=torch.uint8)


def fast_weight(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random bytes that need no exact decoding."""
    weight, scale = special_weight(n, k)
    codes = weight.view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scale = scale % 135 if dtype == torch.bfloat16 else 95 + scale % 40
    return codes.view(torch.float8_e4m3fn), scale


def moved_by_tma(rows: Tensor) -> list[int]:
    """Words ``[rows, 32]`` as TMA leaves them in shared memory with a swizzle of 128 bytes: of the eight chunks of 16
    bytes in a row, chunk c comes to lie where c xor the row's number modulo 8 is.
    """
    chunks = rows.reshape(-1, 8, 4)
    moved = torch.empty_like(chunks)
    for row in range(len(chunks)):
        for chunk in range(8):
            moved[row, chunk ^ row % 8] = chunks[row, chunk]
    return moved.flatten().tolist()


def places(bases: list[list[int]], shape: tuple[int, ...]) -> Tensor:
    """Where a shared layout puts each item of a tensor of that shape."""
    found = torch.full(shape, -1)
    for place in range(math.prod(shape)):
        at = [0] * len(shape)
        for bit, basis in enumerate(bases):
            if place >> bit & 1:
                at = [a ^ b for a, b in zip(at, basis, strict=True)]
        found[tuple(at)] = place
    assert (found >= 0).all()
    return found


@pytest.mark.parametrize("rows", [64, 128])
def test_a_lane_reads_its_registers_of_the_matrix_instruction_16_bytes_at_a_time(rows: int) -> None:
    """The instruction takes operand A of 16 elements of K in four registers of each lane. As the PTX ISA has it, lane
    l of warp w holds rows 16 * w + l / 4 and that + 8, elements 2 * (l % 4) and the next, and both + 8.
    """
    weight, scale = fast_weight(128, 128, torch.bfloat16)
    block = packing.pack(weight, scale)[:128]
    codes = weight.view(torch.uint8)
    for first_row in range(0, 128, rows):
        for half in range(2):
            start = half * 64 + first_row // 2
            words = moved_by_tma(block[start : start + rows // 2])
            place = places(fragments.words_layout(rows).offset_bases, (rows // 16, 8, 2, 2, 2, 4))
            for thread in range(2 * rows):
                warp, lane = divmod(thread, 32)
                row, element = first_row + 16 * warp + lane // 4, 64 * half + 2 * (lane % 4)
                for k5 in range(2):
                    read = place[warp, lane // 4, k5, :, :, lane % 4].T.flatten().tolist()  # k3, k4
                    assert sorted(read) == list(range(min(read), min(read) + 4))
                    assert min(read) % 4 == 0
                    for k4 in range(2):
                        for k3 in range(2):
                            one, other = separated(words[read[2 * k3 + k4]])
                            k = element + 32 * k5 + 16 * k4 + 8 * k3
                            assert one == codes[row, k : k + 2].tolist()
                            assert other == codes[row + 8, k : k + 2].tolist()


def separated(word: int) -> tuple[list[int], list[int]]:
    """The codes of two neighbours in row r, and in row r + 8: the bits that the kernel makes a bfloat16's, or a
    float16's.
    """
    found = []
    for dtype, shift, others in ((gl.bfloat16, 4, 0x780F780F), (gl.float16, 7, 0x407F407F)):
        bits = [int(value) & 0xFFFFFFFF for value in fragments.separate.fn(_Word(word), dtype, False)]
        assert all(pair & others == 0 for pair in bits)
        found.append(
            [[half >> 8 & 0x80 | half >> shift & 0x7F for half in (pair & 0xFFFF, pair >> 16)] for pair in bits]
        )
    assert found[0] == found[1]
    return found[0][0], found[0][1]


class _Word(int):
    """An int32 that takes the kernel's constants."""

    def __and__(self, other: Any) -> _Word:
        return _Word(int(self) & getattr(other, "value", other))

    def __lshift__(self, by: int) -> _Word:
        return _Word(int(self) << by)

    def __rshift__(self, by: int) -> _Word:
        return _Word(int(self) >> by)

    def __or__(self, other: int) -> _Word:
        return _Word(int(self) | int(other))


@pytest.mark.parametrize("rows", [64, 128])
def test_eight_lanes_that_read_together_find_their_words_in_different_banks(rows: int) -> None:
    place = places(fragments.words_layout(rows).offset_bases, (rows // 16, 8, 2, 2, 2, 4))
    for warp in range(rows // 16):
        for k5 in range(2):
            for first in range(0, 32, 8):  # 16 bytes of eight lanes are all that the banks give at once
                lanes = range(first, first + 8)
                chunks = {int(place[warp, lane // 4, k5, 0, 0, lane % 4]) // 4 % 8 for lane in lanes}
                assert len(chunks) == 8


# --- simulated: the kernels' own code -------------------------------------------------------------------------------


class Array(torch.Tensor):
    """A tensor of Gluon on the CPU: ``+=`` makes another one."""

    type = SimpleNamespace(layout=None)
    __iadd__ = torch.Tensor.__add__

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Array:
        return self.view(dtype) if bitcast else super().to(dtype)


def array(tensor: Tensor) -> Array:
    return tensor.contiguous().as_subclass(Array)


class Pointer:
    """A pointer to a tensor's memory, or pointers. Reading or writing outside of the memory raises."""

    def __init__(self, memory: Tensor, places: Any = 0) -> None:
        self.memory, self.places = memory, places
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.places + offset)

    def load(self, mask: Any = None, other: int = 0, eviction_policy: str = "") -> Array:
        places = torch.as_tensor(self.places)
        used = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.broadcast_to(places.shape)
        self._check(places[used])
        found = self.memory.flatten()[places.where(used, 0).long()]
        return array(torch.where(used, found, torch.tensor(other, dtype=found.dtype)))

    def store(self, value: Tensor, mask: Tensor) -> None:
        places, mask = (each.broadcast_to(value.shape) for each in (self.places, mask))
        self._check(places[mask])
        self.memory.view(-1)[places[mask].long()] = value[mask].as_subclass(Tensor)

    def _check(self, places: Tensor) -> None:
        assert ((places >= 0) & (places < self.memory.numel())).all(), "outside of the memory"


class Shared:
    """Shared memory as TMA has filled it."""

    def __init__(self, words: list[int]) -> None:
        self.words = torch.tensor(words, dtype=torch.int32)

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        return SimpleNamespace(load=lambda _: array(self.words.view(dtype)[places(layout, tuple(shape))]))


def _assembly(text: str, constraints: str, args: list[Array], *_: Any) -> Any:
    """Executes PTX."""
    outputs = constraints.count("=")
    values: dict[str, Tensor] = {f"${outputs + i}": arg.contiguous() for i, arg in enumerate(args)}
    for statement in text.removeprefix("{\n").removesuffix("}").split(";"):
        name, _, operands = statement.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        into, *sources = re.findall(r"\{[^}]*\}|[^\s,]+", operands)
        result = _instruction(name, [_operand(values, source) for source in sources])
        halves = re.findall(r"[^{},\s]+", into)
        parts = [result] if len(halves) == 1 else result.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
        values |= {half: array(part) for half, part in zip(halves, parts, strict=True)}
    found = tuple(values[f"${i}"] for i in range(outputs))
    return found if outputs > 1 else found[0]


def _operand(values: dict[str, Tensor], name: str) -> Tensor:
    """A register, or two of 16 bits in braces as one, the first in its lower half; or a number."""
    if name.isdecimal():
        return torch.tensor(int(name), dtype=torch.int32)
    if not name.startswith("{"):
        return values[name]
    return torch.stack([values[half] for half in re.findall(r"[^{},\s]+", name)], -1).view(torch.int32).squeeze(-1)


def _instruction(name: str, args: list[Tensor]) -> Tensor:
    if name == "mov.b32":
        return args[0]
    if name == "prmt.b32":  # four bytes, each chosen by its number among the eight of two words
        one, other, numbers = torch.broadcast_tensors(*args)
        found = torch.stack([one, other], -1).view(torch.uint8)
        chosen = torch.stack([numbers >> 4 * i & 7 for i in range(4)], -1)
        return found.gather(-1, chosen.long()).view(torch.int32).squeeze(-1)
    if name == "cvt.f32.f16":
        return args[0].view(torch.float16).float()
    if name == "cvt.rn.f16x2.e4m3x2":
        return args[0][..., None].view(torch.float8_e4m3fn).to(torch.float16).view(torch.int32).squeeze(-1)
    kind = torch.bfloat16 if ".bf16x2" in name else torch.float16
    if name in ("mul.rn.bf16x2", "mul.rn.f16x2"):
        one, other = (arg.contiguous().view(kind) for arg in args)
        return (one * other).view(torch.int32)
    assert name in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"), name
    upper, lower = args
    return torch.stack([lower, upper], -1).to(kind).view(torch.int32).squeeze(-1)


def _without_layout(*_: Any) -> None:
    return None


GLUON: dict[str, Any] = {
    "load": lambda pointer, **options: pointer.load(**options),
    "store": lambda pointer, value, mask: pointer.store(value, mask),
    "arange": lambda first, end, layout=None: array(torch.arange(first, end, dtype=torch.int32)),
    "full": lambda shape, value, dtype, layout: array(torch.full(shape, value, dtype=dtype)),
    "zeros": lambda shape, dtype, layout: array(torch.zeros(shape, dtype=dtype)),
    "minimum": lambda one, other: torch.minimum(torch.as_tensor(one), torch.as_tensor(other)),
    "maximum": lambda one, other: torch.maximum(torch.as_tensor(one), torch.as_tensor(other)),
    "where": torch.where,
    "sum": torch.sum,
    "reshape": torch.reshape,
    "permute": torch.permute,
    "expand_dims": torch.unsqueeze,
    "broadcast": torch.broadcast_tensors,
    "join": lambda one, other: torch.stack([one, other], -1),
    "split": lambda both: both.unbind(-1),
    "convert_layout": lambda values, layout, assert_trivial=False: values,
    "inline_asm_elementwise": _assembly,
    "static_range": range,
    "SharedLinearLayout": lambda bases, blocks, alignment: bases,
    "NVMMASharedLayout": lambda *arguments: swizzled_pairs(*arguments),
    "DotOperandLayout": _without_layout,
    "NVMMADistributedLayout": _without_layout,
    "SliceLayout": _without_layout,
    "constexpr": object,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``fragments``, ``canonical`` and ``direct`` as functions of Python, and the Gluon that they then use."""
    gluon = SimpleNamespace(**GLUON)
    for module in (fragments, canonical, direct):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.jit.JITFunction):
                monkeypatch.setattr(module, name, value.fn)
            elif isinstance(value, triton.language.constexpr):
                monkeypatch.setattr(module, name, value.value)
            elif type(value).__name__ == "ConstexprFunction":
                monkeypatch.setattr(module, name, value.fn)
        monkeypatch.setattr(module, "gl", gluon)
    for name in ("places_along", "_any_words", "_any_scales", "_any_pairs"):  # the same in every program
        monkeypatch.setattr(direct, name, functools.cache(getattr(direct, name)))
    for module in (fragments, canonical):
        monkeypatch.setattr(module, "reinterpret", Shared.reinterpret)
    monkeypatch.setattr(direct, "mma_v2", lambda one, other, total: total + torch.bmm(one.float(), other.float()))
    return gluon


@DTYPE
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("rows", [64, 128])
def test_a_fragment_is_the_dequantized_tile(
    simulated: SimpleNamespace, dtype: torch.dtype, exact: bool, rows: int
) -> None:
    weight, scale = special_weight(128, 128) if exact else fast_weight(128, 128, dtype)
    expected = reference.dequant(weight, scale, dtype)
    block = packing.pack(weight, scale)
    for first in range(0, 128, rows):
        scales = Shared(block[128 + first // 32 : 128 + (first + rows) // 32].flatten().tolist())
        for half in range(2):
            start = half * 64 + first // 2
            words = Shared(moved_by_tma(block[start : start + rows // 2]))
            actual = fragments.weight_fragment(words, scales, half, rows, None, dtype, exact)
            assert_same(actual.as_subclass(Tensor), expected[first : first + rows, half * 64 : half * 64 + 64])


# --- simulated: canonical weights -----------------------------------------------------------------------------------


def swizzled_pairs(swizzle: int, bits: int, rank: int) -> list[list[int]]:
    """The shared layout in which the kernel reads what TMA has brought with a swizzle of 64 bytes, of 16 bits each, as
    bases: of the four chunks of 16 bytes in a row, chunk c lies where c xor half the row's number modulo 4 is.
    """
    assert (swizzle, bits, rank) == (64, 16, 2)
    return [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 0], [2, 8], [4, 16], *([8 << i, 0] for i in range(4))]


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


def linear_layout(layout: Any, shape: list[int]) -> Any:
    """What a layout is to Triton, by its bases."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("this version of Triton cannot be asked: it ends the process")
    from triton._C.libtriton import gluon_ir, ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    context = ir.context()
    ir.load_dialects(context)
    make_backend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    return builder.to_linear_layout(layout._to_ir(builder), shape)


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


# --- simulated: very few rows ---------------------------------------------------------------------------------------


def directly(gluon: SimpleNamespace, x: Tensor, packed: Tensor, n: int, bias: Tensor | None, warps: int) -> Tensor:
    """What ``direct.kernel`` computes, program by program, with x at the very end of its memory."""
    m, k = x.shape
    out = torch.full((m, n), torch.nan, dtype=x.dtype)
    pointers = (x.contiguous().view(torch.int32), packed, x if bias is None else bias, out)
    constants = (4 if m <= 4 else 8, warps, k % (256 * warps) != 0, bias is not None)
    for program in range(2 * -(-n // 16)):
        gluon.program_id = lambda _, program=program: program
        direct.kernel(*map(Pointer, pointers), m, n, k, *constants)
    return out


@DTYPE
def test_direct_computes_linear_for_any_shape_and_reads_nothing_else(
    simulated: SimpleNamespace, dtype: torch.dtype
) -> None:
    for m, n, k in ((1, 1, 32), (2, 7, 96), (3, 33, 288), (8, 130, 1056), (5, 17, 4128), (4, 40, 2048)):
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        packed = packing.pack(weight, scale)
        for warps in (4, 8):
            for offset in (bias, None):
                actual = directly(simulated, x, packed, n, offset, warps)
                assert_same(actual, reference.linear(x, weight, scale, offset))


@DTYPE
@pytest.mark.parametrize("special", [False, True], ids=["fast", "exact"])
def test_direct_decodes_every_element(simulated: SimpleNamespace, dtype: torch.dtype, special: bool) -> None:
    """Under scales where something changes, and some in between. Of four warps two have nothing to do."""
    smallest = 0 if dtype == torch.bfloat16 else 95
    scales = (0, 1, 2, 135, 254, 255) if special else (smallest, smallest + 1, 127, 133, 134)
    weight, scale = one_code_a_row(scales, 160, nan=special)
    packed = packing.pack(weight, scale)
    assert bool(packed[-1, DTYPES.index(dtype)]) == special
    actual = directly(simulated, torch.ones(1, 160, dtype=dtype), packed, len(weight), None, 4)
    assert_same(actual[0], what_codes_mean(weight, scale, dtype))


# --- where the kernels cannot be had --------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that dispatch takes for a Hopper chip, whose fallback is computed on the CPU."""
    monkeypatch.setattr(dispatch, "_gluon", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        dispatch.elementwise,
        "dequant_packed",
        lambda packed, n, k, dtype: reference.dequant(*packing.unpack(packed, n, k), dtype),
    )
    return torch.device("cpu")


def without_kernels(monkeypatch: pytest.MonkeyPatch, instead: Any) -> None:
    monkeypatch.setitem(sys.modules, "mxfp8_ops.gpu.hopper", instead)
    monkeypatch.delattr("mxfp8_ops.gpu.hopper", raising=False)
    if instead is not None:
        monkeypatch.setattr("mxfp8_ops.gpu.hopper", instead, raising=False)


def test_a_triton_without_gluon_is_one_warning_and_no_kernels(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, None)
    with pytest.warns(UserWarning, match="kernels in Gluon fail"):
        assert dispatch._hopper_kernels(hopper) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._hopper_kernels(hopper) is None


@pytest.mark.parametrize(
    "error", [triton.errors.TritonError("no such instruction"), RuntimeError("PassManager::run failed")]
)
def test_kernels_that_do_not_compile_are_one_warning_and_right_answers(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = []

    def linear(*args: Any) -> None:
        calls.append(args)
        raise error

    without_kernels(monkeypatch, SimpleNamespace(linear_packed=linear))
    x, weight, scale, bias = exact_linear_inputs(3, 33, 288, torch.bfloat16)
    packed, expected = mxfp8_ops.pack(weight, scale), reference.linear(x, weight, scale, bias)
    with pytest.warns(UserWarning, match=str(error)):
        assert_same(dispatch.linear_packed(x, packed, 33, bias), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(dispatch.linear_packed(x, packed, 33, bias), expected)
    assert len(calls) == 1


def test_other_errors_of_the_kernels_are_raised_and_change_nothing(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def linear(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    kernels = SimpleNamespace(linear_packed=linear)
    without_kernels(monkeypatch, kernels)
    x, weight, scale, bias = exact_linear_inputs(3, 33, 288, torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.linear_packed(x, mxfp8_ops.pack(weight, scale), 33, bias)
    assert dispatch._hopper_kernels(hopper) is kernels


def test_kernels_are_for_hopper_alone(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch._hopper_kernels(hopper) is not None
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(dispatch, "_capability", lambda device, capability=capability: capability)
        assert dispatch._hopper_kernels(hopper) is None


def test_a_strided_bias_reaches_the_kernels_in_order(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the bias for contiguous."""
    given: list[Tensor] = []

    def linear(x: Tensor, packed: Tensor, n: int, bias: Tensor) -> Tensor:
        given.append(bias)
        return x.new_empty(len(x), n)

    without_kernels(monkeypatch, SimpleNamespace(linear_packed=linear))
    x, weight, scale, bias = exact_linear_inputs(3, 33, 288, torch.bfloat16)
    dispatch.linear_packed(x, mxfp8_ops.pack(weight, scale), 33, torch.stack([bias, bias + 1], -1)[:, 0])
    assert given[0].is_contiguous()
    assert_same(given[0], bias)


@pytest.mark.parametrize(
    ("m", "k", "name"),
    [
        (8, 256, "mma"),
        (9, 256, "hopper"),
        (64, 256, "hopper"),
        (3072, 256, "hopper"),
        (3073, 256, None),
        (9, 288, "mma"),
        (64, 288, "mma"),
        (65, 288, None),
    ],
)
def test_canonical_weights_of_whole_blocks_reach_the_kernels_from_nine_rows_on(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, m: int, k: int, name: str | None
) -> None:
    called: list[tuple[str, tuple[Tensor, ...]]] = []

    def kernels(name: str) -> Any:
        def linear(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
            called.append((name, (x, weight, *args[:2])))
            return x.new_ones(len(x), len(weight))

        return SimpleNamespace(linear=linear, plan=lambda *args: None)

    monkeypatch.setattr(dispatch, "_gluon_kernels", kernels)
    monkeypatch.setattr(dispatch, "_processors", lambda device: 132)
    monkeypatch.setattr(dispatch, "dequant", lambda weight, scale, dtype: reference.dequant(weight, scale, dtype))
    x, weight, scale, bias = exact_linear_inputs(m, 33, k, torch.bfloat16)
    strided = torch.stack([x, x], -1)[..., 0], weight.T.contiguous().T, scale, torch.stack([bias, bias], -1)[:, 0]
    actual = dispatch.linear(*strided)
    assert [found for found, _ in called] == ([] if name is None else [name])
    for _, given in called:
        for one, other in zip(given, (x, weight, scale, bias), strict=True):
            assert one.is_contiguous()
            assert one.data_ptr() % 16 == 0
            assert_same(one, other)
    if name is None:
        assert_same(actual, reference.linear(x, weight, scale, bias))
