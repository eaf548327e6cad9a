"""The kernels for Hopper compiled where there is none, as ``mxfp8_ops.gpu.hopper`` launches them;
and weights for tests of them. Needs Triton.
"""

from __future__ import annotations

import io
import math
import re
import subprocess
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
from mxfp8_ops.gpu import dispatch, hopper, plans, vectors
from mxfp8_ops.gpu.counts import REGISTERS
from mxfp8_ops.gpu.kinds_few import Vectors

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on Hopper."""

KNOWN = ("3.6", "3.7", "3.8", "3.9")
"""Versions of Triton in which the kernels must compile. With others, weights may do without them."""
DTYPES = (torch.bfloat16, torch.float16)
ENDS = ((4096, True, 0), (4097, False, 1))
"""Numbers of outputs, of which Triton builds on multiples of 16, whether there is a bias, and how many rows a tile
lacks: x comes in other boxes then. Not each with each dtype: kernels take long to compile.
"""

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
    dependent: bool = False

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
        for module in (hopper, vectors):
            patch.setattr(module, "launch", lambda *args, **options: recorded.append(Launch(*args, **options)))
        x, out = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
        offset = torch.empty(n, dtype=dtype) if bias else None
        if isinstance(plan, Vectors):  # on any K
            codes = torch.empty(n, k, dtype=torch.uint8), torch.empty(n, k // 32, dtype=torch.uint8)
            vectors.run(plan, x, *codes, offset, out)
        else:
            hopper._run(plan, x, source_of(n, k, packed, dtype), offset, out)
    return recorded


def source_of(n: int, k: int, packed: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor | hopper.Canonical:
    """A weight ``[n, k]`` as ``hopper`` takes it, packed for x of ``dtype``, on the current device."""
    if packed:
        return torch.empty(packing.packed_shape(n, k, dtype), dtype=torch.int32)
    return hopper.Canonical(torch.empty(n, k // 4, dtype=torch.int32), torch.empty(n, k // 128, dtype=torch.int32))


def tiled_kernels(packed: bool) -> list[plans.Tiled]:
    """Every kernel on tiles that the model knows, as a plan without parts; for canonical weights, as dispatch uses
    them: for more than 8 rows.
    """
    found: list[plans.Tiled] = [plans.Wide(132, rows=rows) for rows in plans.WIDE]
    for kind in plans.TABLE:
        if packed and isinstance(kind, plans.Skinny) and kind.rows == 16:
            found.append(replace(kind, rows=8))
        found.append(kind)
    return found


def one_tile(plan: plans.Plan) -> plans.Plan:
    """The plan without what is no constant of its kernel: parts of tiles."""
    if isinstance(plan, plans.Skinny):
        return replace(plan, parts=1)
    return plans.Wide(132, rows=plan.rows) if isinstance(plan, plans.Wide) else plan


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
    return "i64" if arg >= 2**31 else "i32"


def _is_multiple_of_16(arg: Any) -> bool:
    return isinstance(arg, Tensor) or (isinstance(arg, int) and arg % 16 == 0)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in {text[-2000:]}"
    return int(found[1])


# --- what is asked of every kernel ----------------------------------------------------------------------------------


def compiled(
    plan: plans.Plan, packed: bool, n: int, dtype: torch.dtype, bias: bool, folder: Path, less: int = 0
) -> Compiled:
    k = 4128 if less and isinstance(plan, Vectors) else 4096
    launch = launches(plan, plan.rows - less, n, k, dtype, bias, packed)[0]
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


def check_fits(found: Compiled, at_once: int) -> None:
    """That so many programs fit a multiprocessor."""
    assert found.shared <= SHARED
    assert at_once * (found.shared + 1024) <= SHARED + 1024  # the system takes a KiB for each
    assert at_once * found.threads * -(-found.registers // 8) * 8 <= REGISTERS


def check_waits(found: Compiled) -> None:
    """That before a kernel reads anything, the one before it has ended, which the next one may only then begin to wait
    for. Without dependent launches these instructions do nothing.
    """
    (wait,) = [match.start() for match in re.finditer(r"griddepcontrol\.wait\s*;", found.ptx)]
    (start,) = [match.start() for match in re.finditer(r"griddepcontrol\.launch_dependents\s*;", found.ptx)]
    reads = re.search(r"ld\.global|cp\.async\.bulk", found.ptx)
    assert reads is not None
    assert wait < start < reads.start()


def check_loads(found: Compiled) -> None:
    """That a stage waits for the bytes which are on their way, no more and no less: for more it would wait for ever."""
    stages = loaded_bytes(found)
    assert stages
    assert all(expected == loaded for expected, loaded in stages)


def check_warp_sums(ptx: str, along: int, exchanged: bool = False) -> None:
    """That warps along K store their sums 16 bytes at a time, between the last product and the first result that is
    stored, and nothing is shuffled: unless there is something that lanes exchange.
    """
    last = ptx.rindex("mma.sync")
    assert ("shfl.sync.bfly" in ptx[last:]) == exchanged
    assert "shfl.sync.bfly" not in ptx[:last]
    stored = re.findall(r"st\.shared\S*", ptx[last : ptx.index("st.global", last)])
    assert bool(stored) == (along > 1)
    assert all(".v4" in each for each in stored)


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


def check_innermost_loop(folder: Path) -> None:
    """That the loop over K does not use local memory."""
    assert not any("STL" in line or "LDL" in line for line in min(fast_loops(folder / "kernel.cubin"), key=len))
