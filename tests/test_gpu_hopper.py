"""The kernels on packed weights without a Hopper chip: compiled for one, and simulated on the CPU.

What no compiler checks is shown here: that the words which a lane reads are the ones that its registers of the matrix
instruction want. Results on the chip itself are in tests/test_gpu_packed.py.
"""

from __future__ import annotations

import contextlib
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
from helpers import assert_same, exact_linear_inputs
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
    what_codes_mean,
)

from mxfp8_ops.gpu import direct, dispatch, fragments, plans  # noqa: E402

KNOWN = ("3.6", "3.7")
"""Versions of Triton in which the kernels must compile. With others, packed weights may do without them."""
CHIPS = (78, 114, 132)  # multiprocessors
DTYPES = (torch.bfloat16, torch.float16)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])


def chosen_kernels() -> list[plans.Plan]:
    """A plan for every kernel that the table chooses anywhere."""
    sizes = [
        (m, n, k) for m in (*range(1, 301), 1024, 4096) for n in (1, 1024, 4097, 14336, 151936) for k in (32, 4096)
    ]
    return sorted({one_tile(plans.plan(*size, chip)) for size in sizes for chip in CHIPS}, key=repr)


@pytest.fixture(params=chosen_kernels(), ids=repr)
def kernel(request: pytest.FixtureRequest) -> plans.Plan:
    return request.param


# --- compiled -------------------------------------------------------------------------------------------------------


def compiled(plan: plans.Plan, n: int, dtype: torch.dtype, bias: bool, folder: Path) -> Compiled:
    launch = launches(plan, plan.rows, n, 4096, dtype, bias)[0]
    try:
        return compile_for_hopper(launch, folder)
    except Exception as error:
        if not triton.__version__.startswith(KNOWN) and dispatch._is_of_compiler(error):
            pytest.skip(f"Triton {triton.__version__} does not compile it, and dispatch does without")
        raise


@DTYPE
def test_every_kernel_that_the_table_chooses_compiles_and_fits_a_multiprocessor(
    kernel: plans.Plan, dtype: torch.dtype, tmp_path: Path
) -> None:
    for n, bias in ((4096, True), (4097, False)):  # Triton builds on multiples of 16
        found = compiled(kernel, n, dtype, bias, tmp_path)
        assert found.shared <= SHARED
        assert found.registers * found.threads <= plans.REGISTERS
        assert "serialized" not in found.log, found.log  # matrix instructions that wait for each other
        if isinstance(kernel, plans.Skinny):
            assert found.spilled == 0
            assert "ld.shared.v4" in found.ptx
        elif isinstance(kernel, plans.Direct):
            assert re.search(r"ld\.global\S*evict_first\S*\.v4", found.ptx)
            assert found.registers <= kernel.registers
    loops = fast_loops(tmp_path / "kernel.cubin")
    assert loops, "no loop decodes fast"
    for loop in loops:
        stored, loaded = (sum(name in line for line in loop) for name in ("STL", "LDL"))
        assert stored <= 2  # what is kept in local memory was stored before: the loop only reads it again
        assert loaded <= 8


@pytest.mark.parametrize("m", [1, 16, 200])
def test_a_weight_of_one_row_compiles(m: int, tmp_path: Path) -> None:
    """Triton makes a constant of an N that is 1."""
    assert compiled(one_tile(plans.plan(m, 1, 4096, 132)), 1, torch.bfloat16, True, tmp_path).shared <= SHARED


def fast_loops(cubin: Path) -> list[list[str]]:
    """The instructions of every loop that multiplies what it has decoded in the dtype of x: not through float32."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
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
    for place in range(1 << len(bases)):
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
    """The codes of two neighbours in row r, and in row r + 8: the bits that the kernel makes a bfloat16's."""
    bits = [
        int(value) & 0xFFFFFFFF
        for value in fragments.separate.fn(
            _Word(word),
        )
    ]
    one, other = [[half >> 8 & 0x80 | half >> 4 & 0x7F for half in (pair & 0xFFFF, pair >> 16)] for pair in bits]
    assert all(pair & 0x780F780F == 0 for pair in bits)  # a bfloat16's other bits
    return one, other


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
        return SimpleNamespace(load=lambda _: array(self.words[places(layout, tuple(shape))]))

    _reinterpret = reinterpret  # before Triton 3.9


def _assembly(text: str, _: str, args: list[Array], dtype: Any, *__: Any) -> Any:
    kind = torch.bfloat16 if "bf16" in text else torch.float16
    if text.startswith("mov.b32 {"):
        return tuple(array(args[0].view(torch.int16).unflatten(-1, (-1, 2))[..., i]) for i in range(2))
    if text.startswith("mul.rn"):
        one, other = (arg.contiguous().view(kind) for arg in args)
        return array(one * other).view(torch.int32)
    assert text.startswith("cvt.rn")  # the first argument comes to lie in the lower half
    return array(torch.stack(args, -1).to(kind)).view(torch.int32).squeeze(-1)


def _without_layout(*_: Any) -> None:
    return None


GLUON: dict[str, Any] = {
    "load": lambda pointer, **options: pointer.load(**options),
    "store": lambda pointer, value, mask: pointer.store(value, mask),
    "arange": lambda first, end, layout=None: array(torch.arange(first, end, dtype=torch.int32)),
    "full": lambda shape, value, dtype, layout: array(torch.full(shape, value, dtype=dtype)),
    "zeros": lambda shape, dtype, layout: array(torch.zeros(shape, dtype=dtype)),
    "minimum": lambda one, other: torch.minimum(torch.as_tensor(one), torch.as_tensor(other)),
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
    "DotOperandLayout": _without_layout,
    "NVMMADistributedLayout": _without_layout,
    "SliceLayout": _without_layout,
    "constexpr": object,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``fragments`` and ``direct`` as functions of Python, and the Gluon that they then use."""
    gluon = SimpleNamespace(**GLUON)
    for module in (fragments, direct):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.jit.JITFunction):
                monkeypatch.setattr(module, name, value.fn)
            elif isinstance(value, triton.language.constexpr):
                monkeypatch.setattr(module, name, value.value)
            elif type(value).__name__ == "ConstexprFunction":
                monkeypatch.setattr(module, name, value.fn)
        monkeypatch.setattr(module, "gl", gluon)
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


def directly(gluon: SimpleNamespace, x: Tensor, packed: Tensor, n: int, bias: Tensor | None, warps: int) -> Tensor:
    """What ``direct.kernel`` computes, program by program, with x at the very end of its memory."""
    m, k = x.shape
    out = torch.full((m, n), torch.nan, dtype=x.dtype)
    for program in range(-(-n // 16)):
        gluon.program_id = lambda _, program=program: program
        pointers = (Pointer(x.contiguous().view(torch.int32)), Pointer(packed))
        direct.kernel(
            *pointers, Pointer(x if bias is None else bias), Pointer(out), m, n, k, 8, warps, bias is not None
        )
    return out


@DTYPE
def test_direct_computes_linear_for_any_shape_and_reads_nothing_else(
    simulated: SimpleNamespace, dtype: torch.dtype
) -> None:
    for m, n, k in ((1, 1, 32), (2, 7, 96), (3, 33, 288), (8, 130, 1056), (5, 17, 4128)):
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        packed = packing.pack(weight, scale)
        for warps in (2, 4, 8):
            for offset in (bias, None):
                actual = directly(simulated, x, packed, n, offset, warps)
                assert_same(actual, reference.linear(x, weight, scale, offset))


@DTYPE
@pytest.mark.parametrize("special", [False, True], ids=["fast", "exact"])
def test_direct_decodes_every_element(simulated: SimpleNamespace, dtype: torch.dtype, special: bool) -> None:
    """Under scales where something changes, and some in between. Of four warps two have nothing to do."""
    smallest = 0 if dtype == torch.bfloat16 else 95
    scales = (0, 1, 2, 3, 94, 127, 135, 246, 254, 255) if special else (smallest, smallest + 1, 127, 133, 134)
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
    monkeypatch.setitem(sys.modules, "mxfp8_ops.gpu.packed", instead)
    monkeypatch.delattr("mxfp8_ops.gpu.packed", raising=False)
    if instead is not None:
        monkeypatch.setattr("mxfp8_ops.gpu.packed", instead, raising=False)


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

    without_kernels(monkeypatch, SimpleNamespace(linear=linear))
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

    kernels = SimpleNamespace(linear=linear)
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

    without_kernels(monkeypatch, SimpleNamespace(linear=linear))
    x, weight, scale, bias = exact_linear_inputs(3, 33, 288, torch.bfloat16)
    dispatch.linear_packed(x, mxfp8_ops.pack(weight, scale), 33, torch.stack([bias, bias + 1], -1)[:, 0])
    assert given[0].is_contiguous()
    assert_same(given[0], bias)
