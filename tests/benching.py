"""scripts/bench.py as a module, and a device for it that does not time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from programs import imported

import mxfp8_ops

US = {
    "R": [10.0, 10.0, 10.0],
    "B": [20.0, 20.0, 20.0],
    "packed": [12.5, 12.0, 13.0],
    "canonical": [10.5, 10.5, 10.5],
    "folded": [20.2, 20.2, 20.2],
    "emulated": [400.0, 400.0, 400.0],
    "emulated, compiled": [100.0, 100.0, 100.0],
    "copy": [9.0, 9.0, 9.0],
    "dequant to bfloat16": [10.0, 10.0, 10.0],
    "dequant to float16": [9.0, 9.0, 9.0],
    "quantize from bfloat16": [10.0, 10.0, 10.0],
}
"""Microseconds of each column in three rounds."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("bench", monkeypatch) as module:
        yield module


class FakeTimer:
    """Calls everything once; the times come from ``US``, those of cliffs from ``cliff``."""

    def __init__(self) -> None:
        self.calls = 0

    def interleaved(self, columns: Mapping[str, Any], replays: int) -> dict[str, list[float]]:
        for calls in columns.values():
            for call in calls:
                call()
                self.calls += 1
        return {name: self.cliff(int(name)) if name.isdecimal() else US[name] for name in columns}

    def host(self, calls: Mapping[str, Any]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 10.0 + i for i, name in enumerate(calls)}

    def sustained(self, calls: Any, seconds: float, watch: Callable[[], Any]) -> tuple[float, Any]:
        for call in calls:
            call()
        multiplies = calls[0].func
        us = {torch.nn.functional.linear: 20.0, mxfp8_ops.linear: 18.0}.get(multiplies, 24.0)
        return us, watch()

    @staticmethod
    def cliff(m: int) -> list[float]:
        return [30.0 if m == 15 else 10.0] * 3


@pytest.fixture
def fake(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeTimer:
    """In place of the CUDA device one on the CPU that does not time. Gives its timer."""
    bars, devices, sections = (
        importlib.import_module(f"benchmarks.{name}") for name in ("bars", "devices", "sections")
    )
    timer = FakeTimer()

    class Fake(devices.Device):
        place = "cpu"
        rotated_bytes = 1
        read_configurations = ("R",)

        @classmethod
        def open(cls) -> Fake:
            return cls(timer)

        @classmethod
        def missing(cls) -> None:
            return None

        def environment(self) -> dict[str, Any]:
            clocks = {"sm": 1500, "sm_max": 1980}
            versions = {"torch": "2.11", "triton": "3.6", "cuda": "13.0"}
            return {"device": "Fake GPU", **versions, "clocks": clocks, "switches": {"MXFP8_AUTOTUNE": "1"}}

        def state(self) -> dict[str, int]:
            return {"mhz": 1500, "watts": 690}

        def read(self, words: torch.Tensor, configuration: str) -> None:
            words.sum()

        def compile(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return function

        def release(self) -> None:
            pass

    monkeypatch.setitem(devices.DEVICES, "cuda", Fake)
    monkeypatch.setattr(bars, "SHAPES", ((64, 64), (128, 32), (32, 64)))  # so that bars apply to them
    monkeypatch.setattr(bars, "WITHOUT_BARS", (32, 64))
    monkeypatch.setattr(bars, "SMALL", (128, 32))
    monkeypatch.setattr(sections, "HOST_SHAPE", (64, 64))
    return timer
