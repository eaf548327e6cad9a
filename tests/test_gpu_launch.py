"""Launching kernels, on a device that is not there."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import absent_device
from absent_device import BOX, CASES, LAYOUT, Device, add, copy, known, on_device, plain_leaves, two_descriptors
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental.gluon import language as gl
from triton.runtime.jit import native_specialize_impl

from mxfp8_ops.gpu import launch as launching
from mxfp8_ops.gpu.launch import box, launch, specialization

device = absent_device.device


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
