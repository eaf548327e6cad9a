"""Gluon on the CPU: kernels as functions of Python, whose tensors are torch's and whose memory is checked at every
access; and how layouts put things in memory. Needs Triton.
"""

from __future__ import annotations

import functools
import math
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from compiling import DTYPES, one_code_a_row
from torch import Tensor

from mxfp8_ops import packing
from mxfp8_ops.gpu import canonical, direct, fragments, lanes, scaled_codes
from mxfp8_ops.gpu import places as numbers
from mxfp8_ops.gpu import row as single

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])


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


def packed_codes(k: int, dtype: torch.dtype, packed_for: torch.dtype, special: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A weight of ``one_code_a_row``, its scale, and both packed: under scales where something changes for x of
    ``dtype``, and some in between; special, if some codes need exact decoding.
    """
    smallest = 0 if dtype == torch.bfloat16 else 95
    scales = (0, 1, 2, 135, 254, 255) if special else (smallest, smallest + 1, 127, 133, 134)
    weight, scale = one_code_a_row(scales, k, nan=special)
    packed = packing.pack(weight, scale, dtype=packed_for)
    assert packing.exact_marks(packed)[DTYPES.index(dtype)] == special
    return weight, scale, packed


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


def swizzled_pairs(swizzle: int, bits: int, rank: int) -> list[list[int]]:
    """The shared layout in which the kernel reads what TMA has brought with a swizzle of 64 bytes, of 16 bits each, as
    bases: of the four chunks of 16 bytes in a row, chunk c lies where c xor half the row's number modulo 4 is.
    """
    assert (swizzle, bits, rank) == (64, 16, 2)
    return [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 0], [2, 8], [4, 16], *([8 << i, 0] for i in range(4))]


# --- kernels as functions of Python ---------------------------------------------------------------------------------


class Array(torch.Tensor):
    """A tensor of Gluon on the CPU: ``+=`` makes another one."""

    type = SimpleNamespace(layout=None)
    __iadd__ = torch.Tensor.__add__

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Array:
        if dtype == torch.uint32:  # which torch.Tensor can do little with
            return super().to(torch.int64) & 0xFFFFFFFF
        return self.view(dtype) if bitcast else super().to(dtype)


def array(tensor: Tensor) -> Array:
    return tensor.contiguous().as_subclass(Array)


class Pointer:
    """A pointer to a tensor's memory, or pointers. Reading or writing outside of the memory raises."""

    type = SimpleNamespace(layout=None)

    def __init__(self, memory: Tensor, places: Any = 0) -> None:
        self.memory, self.places = memory, places
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.places + offset)

    def to(self, dtype: torch.dtype) -> Pointer:
        return Pointer(self.memory.view(dtype), self.places * self.memory.itemsize // dtype.itemsize)

    def load(self, mask: Any = None, other: int = 0, eviction_policy: str = "", cache_modifier: str = "") -> Array:
        places = torch.as_tensor(self.places)
        used = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.broadcast_to(places.shape)
        self._check(places[used])
        found = self.memory.flatten()[places.where(used, 0).long()]
        return array(torch.where(used, found, torch.tensor(other, dtype=found.dtype)))

    def store(self, value: Tensor, mask: Any = True) -> None:
        places, mask = (torch.as_tensor(each).broadcast_to(value.shape) for each in (self.places, mask))
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


class Kept:
    """Shared memory that gives back what was stored."""

    def store(self, value: Array) -> None:
        self.value = value

    def load(self, _: object) -> Array:
        return self.value

    def slice(self, start: int, length: int) -> SimpleNamespace:
        return SimpleNamespace(load=lambda _: self.value[start : start + length])


def _assembly(text: str, constraints: str, args: list[Array | int], *_: Any) -> Any:
    """Executes PTX."""
    outputs = constraints.count("=")
    given = (arg if isinstance(arg, Tensor) else torch.tensor(arg, dtype=torch.int32) for arg in args)
    values = {f"${outputs + i}": array(arg).contiguous() for i, arg in enumerate(torch.broadcast_tensors(*given))}
    for statement in text.removeprefix("{").removesuffix("}").split(";"):
        name, _, operands = statement.strip().partition(" ")
        if name in ("", ".reg", "bar.warp.sync"):
            continue
        into, *sources = re.findall(r"\{[^}]*\}|[^\s,]+", operands)
        result = _instruction(name, [_operand(values, source) for source in sources])
        halves = re.findall(r"[^{},\s]+", into)
        parts = [result] if len(halves) == 1 else result.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
        values |= {half: array(part) for half, part in zip(halves, parts, strict=True)}
    kinds = constraints.split(",")[:outputs]
    found = tuple(values[f"${i}"].view(torch.float32) if "f" in kinds[i] else values[f"${i}"] for i in range(outputs))
    return found if outputs > 1 else found[0]


def _operand(values: dict[str, Tensor], name: str) -> Tensor:
    """A register, or two of 16 bits in braces as one, the first in its lower half; or a number."""
    if name[0].isdecimal():
        return torch.tensor(int(name, 0)).to(torch.int32)
    if not name.startswith("{"):
        return values[name]
    return torch.stack([values[half] for half in re.findall(r"[^{},\s]+", name)], -1).view(torch.int32).squeeze(-1)


def _instruction(name: str, args: list[Tensor]) -> Tensor:
    if name == "mov.b32":
        return args[0]
    if name == "shl.b32":
        return args[0] << args[1]
    if name == "and.b32":
        return args[0] & args[1]
    if name == "shf.l.wrap.b32":  # of two words, of which the first one is the lower, the upper half of all
        lower, upper, by = args
        return (upper << by) | ((lower >> (32 - by)) & ((1 << by) - 1))
    if name == "prmt.b32":  # four bytes, each chosen by its number among the eight of two words
        one, other, numbers = torch.broadcast_tensors(*args)
        found = torch.stack([one, other], -1).view(torch.uint8)
        chosen = torch.stack([numbers >> 4 * i & 7 for i in range(4)], -1)
        return found.gather(-1, chosen.long()).view(torch.int32).squeeze(-1)
    if name == "mul.f32":
        return args[0] * args[1]
    if name == "cvt.f32.f16":
        return args[0].view(torch.float16).float()
    if name == "cvt.rn.f16x2.e4m3x2":
        return args[0][..., None].view(torch.float8_e4m3fn).to(torch.float16).view(torch.int32).squeeze(-1)
    kind = torch.bfloat16 if ".bf16x2" in name else torch.float16
    if name in ("min.u16x2", "max.u16x2"):  # of halves without a sign: below 2**15 they are the same with one
        one, other = (arg.view(torch.int16) for arg in args)
        assert min(one.min(), other.min()) >= 0
        return (torch.minimum if name.startswith("min") else torch.maximum)(one, other).view(torch.int32)
    if name in ("mul.rn.bf16x2", "mul.rn.f16x2", "add.rn.bf16x2", "set.eq.u32.bf16x2", "set.eq.u32.f16x2"):
        one, other = (arg.view(kind) for arg in args)
        if name.startswith("set"):  # all bits of a half
            return (-(one == other).to(torch.int16)).view(torch.int32)
        return (one + other if name.startswith("add") else one * other).view(torch.int32)
    assert name in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"), name
    upper, lower = args
    return torch.stack([lower, upper], -1).to(kind).view(torch.int32).squeeze(-1)


def _without_layout(*_: Any) -> None:
    return None


GLUON: dict[str, Any] = {
    "load": lambda pointer, **options: pointer.load(**options),
    "store": lambda pointer, value, **options: pointer.store(value, **options),
    "arange": lambda first, end, layout=None: array(torch.arange(first, end, dtype=torch.int32)),
    "full": lambda shape, value, dtype, layout: array(torch.full(shape, value, dtype=dtype)),
    "zeros": lambda shape, dtype, layout: array(torch.zeros(shape)).to(dtype),
    "zeros_like": torch.zeros_like,
    "minimum": lambda one, other: torch.minimum(torch.as_tensor(one), torch.as_tensor(other)),
    "maximum": lambda one, other: torch.maximum(torch.as_tensor(one), torch.as_tensor(other)),
    "where": torch.where,
    "abs": torch.abs,
    "sum": torch.sum,
    "max": torch.amax,
    "reshape": torch.reshape,
    "permute": torch.permute,
    "expand_dims": torch.unsqueeze,
    "broadcast": torch.broadcast_tensors,
    "join": lambda one, other: torch.stack([one, other], -1),
    "split": lambda both: both.unbind(-1),
    "convert_layout": lambda values, layout, assert_trivial=False: values,
    "inline_asm_elementwise": _assembly,
    "static_range": range,
    "allocate_shared_memory": lambda dtype, shape, layout: Kept(),
    "BlockedLayout": _without_layout,
    "SwizzledSharedLayout": _without_layout,
    "SharedLinearLayout": lambda bases, blocks=(), alignment=16: bases,
    "DistributedLinearLayout": _without_layout,
    "NVMMASharedLayout": lambda *arguments: swizzled_pairs(*arguments),
    "DotOperandLayout": _without_layout,
    "NVMMADistributedLayout": _without_layout,
    "SliceLayout": _without_layout,
    "constexpr": object,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint32": torch.uint32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def in_python(monkeypatch: pytest.MonkeyPatch, module: ModuleType, gluon: SimpleNamespace) -> None:
    """A module's functions as ones of Python, which use that Gluon."""
    for name, value in list(vars(module).items()):
        if isinstance(value, triton.runtime.jit.JITFunction):
            monkeypatch.setattr(module, name, value.fn)
        elif isinstance(value, triton.language.constexpr):
            monkeypatch.setattr(module, name, value.value)
        elif type(value).__name__ == "ConstexprFunction":
            monkeypatch.setattr(module, name, value.fn)
    monkeypatch.setattr(module, "gl", gluon)


def simulate(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``fragments``, ``canonical``, ``direct`` and ``row`` as functions of Python, and the Gluon that they then use."""
    gluon = SimpleNamespace(**GLUON)
    for module in (fragments, scaled_codes, canonical, numbers, lanes, direct, single):
        in_python(monkeypatch, module, gluon)
    for name in ("places_along", "any_words", "any_scales", "any_pairs"):  # the same in every program
        cached = functools.cache(getattr(lanes, name))
        for module in (lanes, direct, single):
            monkeypatch.setattr(module, name, cached, raising=False)
    for module in (fragments, canonical):
        monkeypatch.setattr(module, "reinterpret", Shared.reinterpret)
    for module in (direct, single):
        monkeypatch.setattr(module, "wait_for_kernel_before", lambda: None)
        monkeypatch.setattr(module, "mma_v2", lambda one, other, total: total + torch.bmm(one.float(), other.float()))
    monkeypatch.setattr(single, "barrier", lambda: None)
    return gluon
