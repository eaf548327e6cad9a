"""Launching a kernel with little host time.

``kernel[grid](...)`` takes 18 us to find the compiled kernel of its arguments. The first ``launch`` of a kernel does
just that; later ones with arguments that Triton would compile the same code for call the compiled kernel's launcher
directly. TMA descriptors are encoded once for an address.

The direct way is private to Triton and taken only where everything is as in the versions that are known here, and
nobody watches launches (hooks, profiling, debugging). Otherwise ``launch`` is ``kernel[grid](...)``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

DESCRIPTORS = 4096
"""Encoded TMA descriptors that are kept, of some 500 bytes each; the least recently used go first."""


@dataclass(frozen=True, eq=False)
class Box:
    """What TMA moves at a time: the shape of a block, and its layout in shared memory (None: a kernel of Triton, not
    of Gluon). Compared by identity, which is fast; ``box`` gives equal ones once.
    """

    block: tuple[int, ...]
    layout: Any = None


box = functools.cache(Box)

Described: TypeAlias = tuple[Tensor, Box, tuple[int, ...], tuple[int, ...]]
"""An argument that the kernel takes as a TMA descriptor: a tensor whose memory is seen in a shape and strides."""

_Direct: TypeAlias = Callable[[tuple[int, ...], int, list[Any]], None]

_known: dict[tuple[Any, ...], tuple[_Direct, JITFunction[Any]]] = {}
_compiling = threading.RLock()


@dataclass(frozen=True, eq=False)
class Launched:
    """A launch that did not go through Triton, and how to do it again with other values of its arguments."""

    kernel: JITFunction[Any]
    direct: _Direct
    grid: tuple[int, ...]
    args: tuple[Any, ...]


_thread = threading.local()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launched | None]]:
    """What this thread launches meanwhile, in order; None for what goes through Triton."""
    launches: list[Launched | None] = []
    before = getattr(_thread, "launches", None)
    _thread.launches = launches
    try:
        yield launches
    finally:
        _thread.launches = before


def _record(kernel: JITFunction[Any], direct: _Direct | None, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    launches = getattr(_thread, "launches", None)
    if launches is not None:
        launches.append(None if direct is None else Launched(kernel, direct, grid, args))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: tuple[Any, ...] = (),
    num_warps: int = 4,
    num_stages: int | None = None,
    maxnreg: int | None = None,
    dependent: bool = False,
) -> None:
    """``kernel[grid](*args, *constants, ...)`` on the current device and stream.

    Args:
        kernel: a function of Triton or Gluon whose constexprs come last and whose globals do not change.
        args: its other arguments: tensors, numbers, None, or ``Described`` for TMA descriptors.
        constants: its constexprs, hashable.
        dependent: it may start before the kernel before it has ended, for which it waits itself.
    """
    options = (num_warps, num_stages, maxnreg, dependent)
    if isinstance(kernel, JITFunction):
        kinds, values = specialization(args)
        if kinds is not None and not watched(kernel):
            active = driver.active
            device = active.get_current_device()
            key = (id(kernel), device, constants, *options, *kinds)
            known = _known.get(key)
            if known is not None:
                known[0](grid, active.get_current_stream(device), values)
                _record(kernel, known[0], grid, args)
                return
            with _compiling:
                compiled = _ordinary(kernel, grid, args, constants, *options)
                direct = _direct(kernel, compiled, args, constants)
            if direct is not None:
                _known[key] = direct, kernel  # which keeps the kernel's id in the key its own
            _record(kernel, direct, grid, args)
            return
    _record(kernel, None, grid, args)
    _ordinary(kernel, grid, args, constants, *options)


def specialization(args: tuple[Any, ...]) -> tuple[list[Any] | None, list[Any]]:
    """On what of the arguments Triton's code may depend, and their values: pointers as integers, descriptors as
    (pointer, shape, strides). None if an argument is of a kind that is left to Triton.

    Triton distinguishes types, 16-byte alignment, multiples of 16, the integer 1, and integers of more than 32 bits.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    for arg in args:
        if type(arg) is int:
            kinds.append(arg if arg == 1 else _integer(arg))
            values.append(arg)
        elif isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            kinds.append(arg.dtype if pointer % 16 == 0 else (arg.dtype, "unaligned"))
            values.append(pointer)
            if not arg.is_cuda:
                return None, values
        elif type(arg) is tuple:
            tensor, moved, shape, strides = arg
            kinds += (tensor.dtype, moved)
            values.append((tensor.data_ptr(), shape, strides))
            if not tensor.is_cuda:
                return None, values
        elif arg is None or type(arg) is float or type(arg) is bool:
            kinds.append(type(arg))
            values.append(arg)
        else:
            return None, values
    return kinds, values


def _integer(value: int) -> int:
    """32, 64 or, unsigned, 65 bits; negative for multiples of 16."""
    bits = 32 if -(2**31) <= value < 2**31 else 64 if value < 2**63 else 65
    return bits if value % 16 else -bits


def watched(kernel: JITFunction[Any]) -> bool:
    """Whether somebody wants to see launches, or changes what is compiled, in ways that the key does not hold."""
    runtime = knobs.runtime
    entered, left = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of hooks; None or one hook if set so
    return bool(
        getattr(entered, "calls", entered)
        or getattr(left, "calls", left)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )


def _ordinary(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int,
    num_stages: int | None,
    maxnreg: int | None,
    dependent: bool,
) -> Any:
    """Launches as everybody does; returns the compiled kernel."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "launch_pdl": dependent or None}
    options = {name: value for name, value in options.items() if value is not None}
    args = tuple(_descriptor(*arg) if type(arg) is tuple else arg for arg in args)
    return kernel[grid](*args, *constants, **options)


def _descriptor(base: Any, box: Box, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    if box.layout is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(base, list(shape), list(strides), list(box.block))
    from triton.experimental.gluon.nvidia import hopper

    return hopper.TensorDescriptor(base, list(shape), list(strides), list(box.block), box.layout)


# --- what is private to Triton --------------------------------------------------------------------------


def _direct(
    kernel: JITFunction[Any], compiled: Any, args: tuple[Any, ...], constants: tuple[Any, ...]
) -> _Direct | None:
    """Calls the launcher of a kernel compiled for these arguments; None where that is not known to be right."""
    try:
        constexprs = [parameter.is_constexpr for parameter in kernel.params]
        if constexprs != [False] * len(args) + [True] * len(constants):
            return None
        call = _launcher(compiled, constants)
        forms = _forms(compiled, args)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return None
    if call is None or forms is None:
        return None
    if not forms:
        return call

    def with_descriptors(grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        for i, form in forms:
            values[i : i + 1] = _encoded(form, *values[i])
        call(grid, stream, values)

    return with_descriptors


def _launcher(compiled: Any, constants: tuple[Any, ...]) -> _Direct | None:
    """The function in C that launches the kernel, whose form depends on Triton's version.

    3.6: one function for every signature, to which hooks come after the memory for scratch, arguments at the end.
    3.7 to 3.9: one function for all, hooks before scratch, then how to read the arguments, which are one tuple.

    From 3.8 on the code is unloaded with the last reference to ``compiled``: the function holds one.
    """
    from triton.backends.nvidia.driver import CudaLauncher

    run = compiled.run
    if type(run) is not CudaLauncher or run.global_scratch_size or run.profile_scratch_size:
        return None
    if getattr(run, "gsan_enabled", False):  # more arguments
        return None
    inner = run.launch
    if inspect.isfunction(inner):  # Triton's encoding of descriptors, around it
        inner = inspect.getclosurevars(inner).nonlocals["launcher"]
    function, metadata = compiled.function, compiled.packed_metadata
    flags = run.launch_cooperative_grid, run.launch_pdl
    grid_and_kernel = ("self", "gridX", "gridY", "gridZ", "stream", "function")
    metadata_and_hooks = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
    version = triton.__version__.split(".")[:2]
    form = tuple(inspect.signature(CudaLauncher.__call__).parameters)

    if version == ["3", "6"] and form == (*grid_and_kernel, "args"):
        head: tuple[Any, ...] = (function, *flags, None, None, metadata, None, None, None)

        def launch_3_6(grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            inner(x, y, z, stream, *head, *values, *constants)

        return launch_3_6

    if version in (["3", "7"], ["3", "8"], ["3", "9"]) and form == (*grid_and_kernel, *metadata_and_hooks, "args"):
        head = (function, *flags, metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)

        def launch_3_7(grid: tuple[int, ...], stream: int, values: list[Any], _kept: Any = compiled) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            inner(x, y, z, stream, *head, (*values, *constants))

        return launch_3_7

    return None


@dataclass(frozen=True, eq=False)
class _Form:
    """All about a descriptor but what it describes."""

    dtype: torch.dtype
    box: Box
    metadata: dict[str, Any]


def _forms(compiled: Any, args: tuple[Any, ...]) -> list[tuple[int, _Form]] | None:
    """The positions of descriptors among the arguments, the last first; None if the kernel takes them otherwise."""
    places = [i for i, arg in enumerate(args) if type(arg) is tuple]
    metadata = getattr(compiled.metadata, "tensordesc_meta", None) or []
    if len(metadata) != len(places) or not all(metadata):
        return None
    forms = [_Form(args[i][0].dtype, args[i][1], meta) for i, meta in zip(places, metadata, strict=True)]
    return list(zip(places, forms, strict=True))[::-1]


@functools.lru_cache(DESCRIPTORS)
def _encoded(form: _Form, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Any, ...]:
    """A descriptor as launchers take it: the 128 bytes of TMA, shape, strides. It depends on an address, not on a
    tensor: memory that is freed and used again is described as rightly.
    """
    from triton.backends.nvidia.driver import make_tensordesc_arg

    base = SimpleNamespace(dtype=form.dtype, data_ptr=lambda: pointer)
    described = _descriptor(base, form.box, shape, strides)
    return tuple(make_tensordesc_arg(described, form.metadata, *_unused(make_tensordesc_arg)))


@functools.cache
def _unused(encode: Callable[..., Any]) -> tuple[None, ...]:
    """What else it takes: from 3.8 on one argument."""
    return (None,) * (len(inspect.signature(encode).parameters) - 2)
