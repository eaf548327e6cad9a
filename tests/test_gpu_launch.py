"""Launching kernels, without a device: Triton compiles for one that is not there, and what it would give to the driver
is recorded.
"""

# ruff: noqa: E402 (without Triton there is nothing to import, and nothing to test)

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import LazyDict
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.runtime.driver import driver
from triton.runtime.jit import native_specialize_impl

from mxfp8_ops.gpu import launch as launching
from mxfp8_ops.gpu.launch import box, launch, specialization
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


# --- launching ------------------------------------------------------------------------------------------

POINTERS = [
    on_device(4, dtype=dtype, offset=offset)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn)
    for offset in (0, 1, 16)
] + [on_device(0)]
EDGES = (0, 1, 16, 2**31, 2**32, 2**63)
INTEGERS = sorted({sign * edge + off for edge in EDGES for off in (-16, -1, 0, 1, 16) for sign in (1, -1)})
NUMBERS = [value for value in INTEGERS if -(2**63) <= value < 2**64]
OTHERS = [True, False, None, 0.0, 1.0, 0.5]


def triton_kind(arg: Any) -> Any:
    return native_specialize_impl(CUDABackend, arg, False, True, True)


@pytest.mark.parametrize("one", [*POINTERS, *NUMBERS, *OTHERS], ids=lambda arg: repr(triton_kind(arg)))
def test_what_triton_specialises_differently_has_another_key(one: Any) -> None:
    for other in [*POINTERS, *NUMBERS, *OTHERS]:
        if triton_kind(one) != triton_kind(other):
            assert specialization((one,))[0] != specialization((other,))[0], (one, other)


def test_described_tensors_have_the_keys_of_their_descriptors() -> None:
    boxes = [box((32, 64)), box((64, 64)), box((32, 64), LAYOUT), box((32, 64), gl.NVMMASharedLayout(64, 16, 2))]
    seen: dict[str, Any] = {}
    for dtype, moved in itertools.product((torch.bfloat16, torch.float16), boxes):
        described = (on_device(64, 64, dtype=dtype), moved, (64, 64), (64, 1))
        seen[triton_kind(launching._descriptor(*described))[0]] = specialization((described,))[0]
    assert len(seen) == 8
    assert len(set(map(repr, seen.values()))) == 8


def test_alike_arguments_share_a_key() -> None:
    assert specialization((48, on_device(5), 5))[0] == specialization((64, on_device(9), 7))[0]
    one, other = (
        (on_device(rows, 64), box((32, 64), gl.NVMMASharedLayout(64, 16, 2)), (rows, 64), (64, 1)) for rows in (32, 64)
    )
    assert specialization((one,))[0] == specialization((other,))[0]


@pytest.mark.parametrize(
    "arg",
    ["text", torch.zeros(3), [1], torch.float32, (torch.zeros(4, 64), None, (), ())],
    ids=lambda arg: type(arg).__name__,
)
def test_arguments_of_other_kinds_are_left_to_triton(arg: Any) -> None:
    assert specialization((on_device(4), arg))[0] is None


CASES = [
    (on_device(64), on_device(64), 64, 3, True, 0.5),
    (on_device(64, offset=1), on_device(64), 64, 3, False, 1.5),
    (on_device(64, dtype=torch.bfloat16), on_device(64), 1, 17, True, None),
    (on_device(64), on_device(64, dtype=torch.float16, offset=1), 2**40, 16, None, 0.5),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_direct_launch_gives_the_driver_what_triton_gives_it(device: Device, case: tuple[Any, ...]) -> None:
    add[(3, 2)](*case, 64, "name", num_warps=2)
    expected = device.last()
    launch(add, (3, 2), case, (64, "name"), num_warps=2)
    assert known() == 1
    device.calls.clear()
    launch(add, (3, 2), case, (64, "name"), num_warps=2)
    assert device.last() == expected
    assert not any(isinstance(arg, torch.Tensor) for arg in plain_leaves(device.calls[-1])), "the direct way"


def plain_leaves(value: Any) -> Iterator[Any]:
    for item in value:
        if isinstance(item, tuple):
            yield from plain_leaves(item)
        else:
            yield item


def test_every_call_gets_the_kernel_that_triton_would_take(device: Device) -> None:
    """Values change from call to call in all ways; what is launched must be compiled for them."""
    xs = [on_device(64), on_device(64, offset=1), on_device(64, dtype=torch.bfloat16)]
    for x, n, more in itertools.product(xs, (64, 63, 1, 2**33), (1, 16, 17)):
        for _ in range(2):
            launch(add, (1,), (x, xs[0], n, more, True, 0.5), (64, "name"))
            launched = device.last()
        add[(1,)](x, xs[0], n, more, True, 0.5, 64, "name", num_warps=4)
        assert launched == device.last(), (x.dtype, n, more)


def test_options_and_constants_tell_kernels_apart(device: Device) -> None:
    args = CASES[0]
    functions = set()
    for constants, options in (
        ((64, "name"), {}),
        ((32, "name"), {}),
        ((64, "other"), {}),
        ((64, "name"), {"num_warps": 8}),
        ((64, "name"), {"maxnreg": 64}),
        ((64, "name"), {"num_stages": 5}),
        ((64, "name"), {"dependent": True}),
    ):
        for _ in range(2):
            launch(add, (1,), args, constants, **options)
            functions.add(device.last()[4])
    assert len(functions) == 7
    assert known() == 7


def test_only_a_dependent_launch_tells_the_driver_that_it_is_one(device: Device) -> None:
    args = CASES[0]
    for dependent in (False, True):
        launched = []
        for _ in range(2):  # by Triton, and directly
            launch(add, (1,), args, (64, "name"), dependent=dependent)
            launched.append(device.last())
        assert launched[0] == launched[1]
        assert launched[0][6] is dependent


def test_code_that_is_launched_directly_stays_loaded(device: Device) -> None:
    """Triton unloads what it has forgotten, from version 3.8 on."""
    launch(add, (1,), CASES[0], (64, "name"))
    assert known() == 1
    add.device_caches.clear()
    gc.collect()
    assert not device.unloaded
    launch(add, (1,), CASES[0], (64, "name"))
    assert len(device.calls) == 2


def test_a_launch_goes_to_the_stream_that_is_current(device: Device) -> None:
    for stream in (7, 7, 8, 9):
        device.stream = stream
        launch(add, (1,), CASES[0], (64, "name"))
        assert device.last()[3] == stream


def described(rows: int = 64) -> tuple[Any, ...]:
    return on_device(rows, 64, dtype=torch.bfloat16), BOX, (rows, 64), (64, 1)


BOX = box((32, 64), LAYOUT)


def test_a_direct_launch_gives_the_descriptors_that_triton_gives(device: Device) -> None:
    argument, out = described(), on_device(32, 64, dtype=torch.bfloat16)
    copy[(1,)](launching._descriptor(*argument), out, 7, 32, num_warps=4)
    expected = device.last()
    for _ in range(2):
        launch(copy, (1,), (argument, out, 7), (32,))
        assert device.last() == expected


def test_each_descriptor_gets_its_own_place(device: Device) -> None:
    other = on_device(128, 128, dtype=torch.float16), box((64, 64), LAYOUT), (128, 128), (128, 1)
    args = described(), 7, other, on_device(4)
    full = [launching._descriptor(*arg) if type(arg) is tuple else arg for arg in args]
    two_descriptors[(1,)](*full, 32, num_warps=4)
    expected = device.last()
    for _ in range(2):
        launch(two_descriptors, (1,), args, (32,))
        assert device.last() == expected
    assert known() == 1


def test_a_descriptor_is_encoded_once_for_an_address_shape_and_strides(device: Device) -> None:
    out = on_device(32, 64, dtype=torch.bfloat16)
    one, other = described(), described()
    launch(copy, (1,), (one, out, 7), (32,))
    launch(copy, (1,), (one, out, 7), (32,))
    before = device.encoded
    for _ in range(3):
        launch(copy, (1,), (one, out, 7), (32,))
        launch(copy, (1,), (other, out, 7), (32,))
    assert device.encoded == before + 1
    for shape, strides in (((32, 64), (64, 1)), ((32, 32), (128, 1))):
        launch(copy, (1,), ((one[0], BOX, shape, strides), out, 7), (32,))
        launched = device.last()
        copy[(1,)](launching._descriptor(one[0], BOX, shape, strides), out, 7, 32, num_warps=4)
        assert launched == device.last()
    assert launching._encoded.cache_info().maxsize == launching.DESCRIPTORS


def test_a_cached_descriptor_keeps_no_tensor_alive(device: Device) -> None:
    import weakref

    argument = described()
    alive = weakref.ref(argument[0])
    for _ in range(2):
        launch(copy, (1,), (argument, on_device(32, 64, dtype=torch.bfloat16), 7), (32,))
    device.calls.clear()
    assert launching._encoded.cache_info().currsize == 1
    del argument
    assert alive() is None


def test_a_box_that_does_not_fit_is_an_error_and_not_a_launch(device: Device) -> None:
    tensor = on_device(64 * 64, dtype=torch.bfloat16, offset=1)
    with pytest.raises(AssertionError, match="aligned"):
        launch(copy, (1,), ((tensor, BOX, (64, 64), (64, 1)), tensor, 7), (32,))
    assert device.calls == []


def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = knobs.HookChain()
    chain.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", chain)


def unhooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)


def left_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda metadata: None)


def debugged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "debug", True)


def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add, "pre_run_hooks", [lambda *args, **kwargs: None])


def instrumented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "mode")


@pytest.mark.parametrize("watch", [hooked, left_hook, debugged, prepared, instrumented])
def test_watched_launches_go_through_triton(
    device: Device, monkeypatch: pytest.MonkeyPatch, watch: Callable[[pytest.MonkeyPatch], None]
) -> None:
    for _ in range(2):
        launch(add, (1,), CASES[0], (64, "name"))
    assert not any(isinstance(arg, torch.Tensor) for arg in plain_leaves(device.calls[-1]))
    runs: list[Any] = []
    monkeypatch.setattr(add, "run", lambda *args, **options: runs.append(args))
    watch(monkeypatch)
    launch(add, (1,), CASES[0], (64, "name"))
    assert len(runs) == 1
    assert known() == 1


def test_absent_hooks_are_no_reason_to_go_through_triton(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    unhooked(monkeypatch)
    launch(add, (1,), CASES[0], (64, "name"))
    monkeypatch.setattr(add, "run", None)
    launch(add, (1,), CASES[0], (64, "name"))
    assert len(device.calls) == 2


def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.99.0")


def other_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    class Patched(nvidia.CudaLauncher):
        pass

    monkeypatch.setattr(driver.active, "launcher_cls", Patched)


def other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", lambda self, *args: self.launch(*args))


def no_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nvidia, "CudaLauncher")


def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = nvidia.CudaLauncher.__init__

    def init(self: Any, src: Any, metadata: Any) -> None:
        made(self, src, metadata)
        self.global_scratch_size = 16

    monkeypatch.setattr(nvidia.CudaLauncher, "__init__", init)
    allocator = SimpleNamespace(get=lambda: lambda size, align, stream: None)
    monkeypatch.setattr("triton.runtime._allocation._allocator", allocator)


@pytest.mark.parametrize("change", [other_version, other_launcher, other_parameters, no_attribute, scratch])
def test_another_triton_is_launched_as_it_wants(
    device: Device, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    change(monkeypatch)
    for _ in range(2):
        launch(add, (1,), CASES[0], (64, "name"))
    assert len(device.calls) == 2
    assert known() == 0


def test_constants_with_defaults_are_left_to_triton(device: Device) -> None:
    x = on_device(4)
    for _ in range(2):
        launch(with_default, (1,), (x,), (4,))
    with_default[(1,)](x, 4, num_warps=4)
    assert plain(device.calls[0]) == plain(device.calls[1]) == device.last()
    assert known() == 0


def test_memory_of_the_host_is_left_to_triton_even_if_the_kernel_is_known(device: Device) -> None:
    for _ in range(2):
        launch(add, (1,), CASES[0], (64, "name"))
    host = torch.zeros(64)
    launch(add, (1,), (host, *CASES[0][1:]), (64, "name"))
    assert any(arg is host for arg in plain_leaves(device.calls[-1])), "which looks where the pointer comes from"


def test_threads_launch_the_same_kernel(device: Device) -> None:
    def work() -> None:
        for n in (64, 63, 1):
            launch(add, (1,), (*CASES[0][:2], n, 3, True, 0.5), (64, "name"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(device.calls) == 12
    assert known() == 3


def test_interpreted_kernels_run_without_a_device() -> None:
    program = (
        "import torch, triton, triton.language as tl\n"
        "from mxfp8_ops.gpu.elementwise import mxfp8_dequant as kernel\n"
        "from mxfp8_ops.gpu.launch import launch\n"
        "codes, scale = torch.full((64,), 0x38, dtype=torch.uint8), torch.full((2,), 128, dtype=torch.uint8)\n"
        "out = torch.zeros(64)\n"
        "for _ in range(2): launch(kernel, (1,), (codes, scale, out, 2), (False, 32, 128))\n"
        "assert bool((out == 2).all()), out\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
