"""What is left to Triton instead of being launched directly, on a device that is not there."""

# ruff: noqa: E402 (without Triton there is nothing to import, and nothing to test)

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import absent_device
from absent_device import CASES, Device, add, hooked, known, on_device, plain, plain_leaves, with_default
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from mxfp8_ops.gpu.launch import launch, specialization

device = absent_device.device


@pytest.mark.parametrize(
    "arg",
    ["text", torch.zeros(3), [1], torch.float32, (torch.zeros(4, 64), None, (), ())],
    ids=lambda arg: type(arg).__name__,
)
def test_arguments_of_other_kinds_are_left_to_triton(arg: Any) -> None:
    assert specialization((on_device(4), arg))[0] is None


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
