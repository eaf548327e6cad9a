"""A CUDA device that is not there: Triton compiles for it, and what it would give to the driver is recorded. Kernels to
launch on it, too. Only where Triton can be imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import LazyDict
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.runtime.driver import driver

from mxfp8_ops.gpu import launch as launching
from mxfp8_ops.gpu.launch import box
from mxfp8_ops.gpu.versions import load_box


@triton.jit
def add(x, out, n, more, flag, factor, SIZE: tl.constexpr, NAME: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i, mask=i < n) + more, mask=i < n)


@triton.jit
def with_default(x, SIZE: tl.constexpr, VALUE: tl.constexpr = 2):
    tl.store(x + tl.arange(0, SIZE), VALUE)


LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


@gluon.jit
def copy(source, out, n, ROWS: gl.constexpr):
    tile = gl.allocate_shared_memory(source.dtype, [ROWS, 64], source.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, ROWS * 64 * 2)
    load_box(source, [0, 0], full, tile)
    mbarrier.wait(full, 0)
    THREADS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, THREADS))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, THREADS))[None, :]
    gl.store(out + row * 64 + column, tile.load(THREADS), mask=row < n)


@gluon.jit
def two_descriptors(one, n, other, out, ROWS: gl.constexpr):
    if n < 0:
        gl.store(out, ROWS)


class OnDevice(torch.Tensor):
    """A tensor in the memory of the host that says it is not."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True


def on_device(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    """A tensor at ``offset`` elements past an aligned address."""
    flat = torch.zeros(torch.Size(shape).numel() + offset, dtype=dtype)[offset:]
    return flat.view(shape).as_subclass(OnDevice)


class Device:
    """Triton's driver of an H100 that is not there: records what the launcher in C is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.encoded = 0
        self.unloaded: list[Any] = []
        self.loads = itertools.count(1000)
        self.stream = 7
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (object(), next(self.loads), 32, 0, 1024),
            unload_module=self.unloaded.append,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            build_signature_metadata=lambda signature: tuple(signature),
            launch=self.launch,
            fill_tma_descriptor=self.encode,
            fill_tma_descriptor_tiled=self.encode,
        )

    def launch(self, *args: Any) -> None:
        self.calls.append(args)

    def encode(self, *args: Any) -> tuple[Any, ...]:
        self.encoded += 1
        return ("map", *(tuple(arg) if isinstance(arg, list) else arg for arg in args))

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def last(self) -> tuple[Any, ...]:
        """The last call, in the form that does not tell whether pointers came as tensors, and without hooks."""
        return plain(self.calls[-1])


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, knobs.HookChain):
        assert not value.calls
        return None
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return None if isinstance(value, LazyDict) else value


def plain_leaves(value: Any) -> Iterator[Any]:
    for item in value:
        if isinstance(item, tuple):
            yield from plain_leaves(item)
        else:
            yield item


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device()
    monkeypatch.setattr(driver, "_active", made)
    for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):  # Triton 3.7 takes them from C
        monkeypatch.setattr(nvidia, name, SimpleNamespace if name == "PyKernelArg" else name, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)  # Triton 3.6 compiles a launcher for every signature
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=made.launch), False)
    forget()
    yield made
    forget()


def forget() -> None:
    launching._known.clear()
    launching._encoded.cache_clear()
    for kernel in (add, copy, two_descriptors, with_default):
        kernel.device_caches.clear()


def known() -> int:
    return len(launching._known)


CASES = [
    (on_device(64), on_device(64), 64, 3, True, 0.5),
    (on_device(64, offset=1), on_device(64), 64, 3, False, 1.5),
    (on_device(64, dtype=torch.bfloat16), on_device(64), 1, 17, True, None),
    (on_device(64), on_device(64, dtype=torch.float16, offset=1), 2**40, 16, None, 0.5),
]
BOX = box((32, 64), LAYOUT)


def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = knobs.HookChain()
    chain.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", chain)
