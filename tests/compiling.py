"""The kernels for Hopper compiled where there is none, as ``mxfp8_ops.gpu.hopper`` launches them;
and weights for tests of them. Needs Triton.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from helpers import expected_from_float64
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from mxfp8_ops import packing
from mxfp8_ops.gpu import hopper, plans

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on Hopper."""

LOG = "ptxas.log"
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
_TYPES |= {torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv"}


def one_code_a_row(scales: Sequence[int], k: int, nan: bool = True) -> tuple[Tensor, Tensor]:
    """``weight [rows, k]`` and ``scale [rows, k/32]``: every element under each of the scales, NaN only if asked for,
    has a row to itself, in changing places between zeros. So linear of ones gives what each code means: no NaN of a
    neighbour hides it.
    """
    codes = torch.tensor([code for code in range(256) if nan or code & 0x7F != 0x7F], dtype=torch.uint8)
    element = codes.repeat(len(scales))
    scale = torch.tensor(scales, dtype=torch.uint8).repeat_interleave(len(codes))
    rows = torch.arange(len(element))
    weight = torch.zeros(len(element), k, dtype=torch.uint8)
    weight[rows, (rows + rows // 256 * 37) % k] = element
    return weight.view(torch.float8_e4m3fn), scale[:, None].repeat(1, k // 32)


def what_codes_mean(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows]``: the sums of the rows that ``one_code_a_row`` gives, which are never -0."""
    return (expected_from_float64(weight, scale, dtype).double().sum(-1) + 0.0).to(dtype)


@dataclass(frozen=True)
class Launch:
    """The arguments of ``launch``."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: tuple[Any, ...]
    num_warps: int = 4
    maxnreg: int | None = None

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by the names of the kernel's parameters."""
        return dict(zip(self.kernel.arg_names, (*self.args, *self.constants), strict=True))


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes from a multiprocessor, and what the assembler said about it."""

    ttgir: str
    ptx: str
    shared: int
    registers: int
    spilled: int
    threads: int
    log: str


def launches(
    plan: plans.Plan,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    packed: bool = True,
) -> list[Launch]:
    """What a plan launches for ``x [m, k]`` and a weight ``[n, k]``, packed or not, of which nothing is computed."""
    recorded: list[Launch] = []
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "launch", lambda *args, **options: recorded.append(Launch(*args, **options)))
        x, out = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
        offset = torch.empty(n, dtype=dtype) if bias else None
        hopper._run(plan, x, source_of(n, k, packed), offset, out)
    return recorded


def source_of(n: int, k: int, packed: bool) -> Tensor | hopper.Canonical:
    """A weight ``[n, k]`` as ``hopper`` takes it, on the current device."""
    if packed:
        return torch.empty(packing.packed_shape(n, k), dtype=torch.int32)
    return hopper.Canonical(torch.empty(n, k // 4, dtype=torch.int32), torch.empty(n, k // 128, dtype=torch.int32))


def tiled_kernels(packed: bool) -> list[plans.Tiled]:
    """Every kernel on tiles that the model knows, as a plan without parts; for canonical weights, as dispatch uses
    them: for more than 8 rows.
    """
    found: list[plans.Tiled] = []
    for kind in plans.TABLE:
        if packed and isinstance(kind, plans.Skinny) and kind.rows == 16:
            found.append(replace(kind, rows=8))
        found.append(kind)
    return found


def one_tile(plan: plans.Plan) -> plans.Plan:
    """The plan without what is no constant of its kernel: parts of tiles."""
    if isinstance(plan, plans.Skinny):
        return replace(plan, parts=1)
    return replace(plan, parts=1, split=0) if isinstance(plan, plans.Wide) else plan


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """Compiles with Triton, which builds on numbers that are 1 or multiples of 16, for a chip that is not there."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, names = launch.kernel, launch.kernel.arg_names
    specialized = [not parameter.do_not_specialize for parameter in kernel.params[: len(launch.args)]]
    constants = {i: arg for i, arg in enumerate(launch.args) if specialized[i] and isinstance(arg, int) and arg == 1}
    constants |= {len(launch.args) + i: value for i, value in enumerate(launch.constants)}
    multiples = [i for i, arg in enumerate(launch.args) if _is_multiple_of_16(arg) and specialized[i]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {name: "constexpr" if i in constants else _type(launch.args[i]) for i, name in enumerate(names)},
        constexprs={(i,): value for i, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    options = {"num_warps": launch.num_warps} | ({"maxnreg": launch.maxnreg} if launch.maxnreg else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a version of Triton has to say about its own future
        return triton.compile(source, target=target, options=options)


def compile_for_hopper(launch: Launch, folder: Path) -> Compiled:
    """Compiles, leaves the program in ``folder`` as kernel.cubin, and says what the assembler said of it, which is kept
    in Triton's cache beside the program.
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(knobs.nvidia, "dump_ptxas_log", True)
        compiled = compile_for(launch, GPUTarget("cuda", 90, 32))
        kept = get_cache_manager(compiled.hash)
        if not printed.getvalue() and kept.get_file(LOG) is None:  # somebody else compiled it
            patch.setattr(knobs.compilation, "always_compile", True)
            compiled = compile_for(launch, GPUTarget("cuda", 90, 32))
    if printed.getvalue():
        kept.put(printed.getvalue(), LOG)
    log = printed.getvalue() or Path(kept.get_file(LOG)).read_text()
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    return Compiled(
        ttgir=compiled.asm["ttgir"],
        ptx=compiled.asm["ptx"],
        shared=compiled.metadata.shared,
        registers=_number(r"Used (\d+) registers", log),
        spilled=_number(r"(\d+) bytes stack frame", log) + _number(r"(\d+) bytes spill stores", log),
        threads=_number(r"\.reqntid (\d+)", compiled.asm["ptx"]),
        log=log,
    )


def _type(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"*{_TYPES[arg.dtype]}"
    if isinstance(arg, tuple):
        tensor, box = arg[:2]
        return f"tensordesc<{_TYPES[tensor.dtype]}{list(box.block)},{box.layout!r}>"
    return "i32"


def _is_multiple_of_16(arg: Any) -> bool:
    return isinstance(arg, Tensor) or (isinstance(arg, int) and arg % 16 == 0)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in {text[-2000:]}"
    return int(found[1])
