"""``scripts/bench.py``: how times are taken, and what is made of them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from programs import imported


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with imported("bench", monkeypatch) as module:
        yield module


# --- statistics and bars -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "us", "spread"),
    [
        ([5.0], 5.0, 0.0),
        ([10.0, 20.0], 15.0, 33.33),
        ([3.0, 1.0, 2.0, 100.0, 4.0], 3.0, 66.67),  # quartiles 2 and 4: one slow replay does not count
        ([2.0] * 11, 2.0, 0.0),
    ],
)
def test_summary_is_the_median_and_the_interquartile_range_in_percent(
    bench: ModuleType, samples: list[float], us: float, spread: float
) -> None:
    assert importlib.import_module("benchmarks.timing").summary(samples) == {"us": us, "spread": spread}


def test_a_ratio_is_of_times_of_the_same_round(bench: ModuleType) -> None:
    ratio = importlib.import_module("benchmarks.timing").ratio
    assert ratio([20.0, 11.0, 60.0], [10.0, 10.0, 40.0]) == 1.5  # of medians: 2
    assert ratio([1.0, 9.0], [2.0, 3.0]) == 1.75


def test_cliffs_compare_with_the_faster_neighbour(bench: ModuleType) -> None:
    cliffs = importlib.import_module("benchmarks.timing").cliffs
    assert cliffs({3: 4.0, 1: 2.0, 2: 3.0, 9: 1.0}) == {1: 2 / 3, 2: 1.5, 3: 4.0, 9: 0.25}
    assert cliffs({5: 1.0}) == {}


@pytest.mark.parametrize(
    ("shape", "m", "limits"),
    [
        ((8192, 8192), 1, {("packed", "R", 1.06), ("canonical", "R", 1.06), ("canonical", "B", 1.0)}),
        ((8192, 8192), 16, {("packed", "R", 1.24), ("canonical", "B", 1.0)}),
        ((4096, 4096), 16, {("packed", "R", 1.55), ("canonical", "B", 1.0)}),
        ((4096, 4096), 32, {("packed", "B", 0.8), ("canonical", "B", 1.0)}),
        ((8192, 8192), 64, {("packed", "B", 0.68), ("canonical", "B", 1.0)}),
        ((4096, 4096), 128, {("packed", "B", 1.0), ("canonical", "B", 1.12)}),
        ((4096, 4096), 8192, {("packed", "B", 1.03), ("canonical", "B", 1.12)}),
        ((1024, 4096), 1, set()),
        ((64, 64), 1, set()),
    ],
)
def test_bars_are_those_of_the_project(
    bench: ModuleType, shape: tuple[int, int], m: int, limits: set[tuple[str, str, float]]
) -> None:
    bars = importlib.import_module("benchmarks.bars")
    ratios = {name: {"R": 1.0, "B": 1.0} for name in ("packed", "canonical")}
    found = list(bars.verdicts({"n": shape[0], "k": shape[1], "m": m, "ratios": ratios}))
    assert {(verdict.column, verdict.unit, verdict.limit) for verdict in found} == limits


def test_a_missed_bar_never_looks_met(bench: ModuleType) -> None:
    bars = importlib.import_module("benchmarks.bars")
    assert [bars.ratio(value, 1.06) for value in (1.06, 1.0601, 1.064, 1.07, 0.5)] == [
        "1.06",
        "1.061",
        "1.064",
        "1.07",
        "0.50",
    ]
    assert [bars.fraction(value, 0.92) for value in (0.92, 0.9199, 0.9151, 0.91)] == ["92%", "91.9%", "91.5%", "91%"]


# --- timing ------------------------------------------------------------------------------------------------


class FakeCuda:
    """As much of ``torch.cuda`` as the timer uses. A call ``run(name, us)`` takes as long in a replay."""

    def __init__(self) -> None:
        self.now = 0.0
        self.captured: list[tuple[str, float]] | None = None
        self.replayed: list[str] = []
        self.captures = 0
        self.slower: Callable[[float], float] = lambda now: 1.0

    def run(self, name: str, us: float) -> None:
        if self.captured is None:
            self.now += us
        else:
            self.captured.append((name, us))

    def Stream(self) -> None:
        return None

    def stream(self, stream: None) -> Any:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        assert self.captured is None

    def graph_pool_handle(self) -> str:
        return "pool"

    def empty_cache(self) -> None:
        pass

    def CUDAGraph(self) -> Any:
        calls: list[tuple[str, float]] = []

        def begin(pool: str) -> None:
            assert pool == "pool"
            self.captured = calls
            self.captures += 1

        def end() -> None:
            self.captured = None

        def replay() -> None:
            self.replayed.append(calls[0][0])
            self.now += sum(us for _, us in calls) * self.slower(self.now)

        return SimpleNamespace(capture_begin=begin, capture_end=end, replay=replay)

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: None
        event.elapsed_time = lambda other: (other.at - event.at) / 1000
        return event


def test_columns_take_turns_settled_before_and_short_graphs_are_repeated(bench: ModuleType) -> None:
    timing = importlib.import_module("benchmarks.timing")
    cuda = FakeCuda()
    columns = {
        name: [lambda n=name, us=us: cuda.run(n, us)] * 3 for name, us in (("a", 300.0), ("b", 40.0), ("c", 1.0))
    }
    settled = []

    def settle() -> None:
        settled.append(len(cuda.replayed))
        cuda.run("settle", 1000.0)

    times = timing.CudaTimer(cuda, settle).interleaved(columns, 4)
    assert times == {"a": [300.0] * 4, "b": pytest.approx([40.0] * 4), "c": pytest.approx([1.0] * 4)}
    assert cuda.captures == 5  # b and c again: 5 and 32 times
    assert "".join(cuda.replayed[-15:]) == "abc" * 5
    assert settled == list(range(len(cuda.replayed) - 12, len(cuda.replayed)))  # before each, on nobody's time


def test_what_runs_for_long_is_timed_when_the_device_has_become_slower(bench: ModuleType) -> None:
    timing = importlib.import_module("benchmarks.timing")
    cuda = FakeCuda()
    cuda.slower = lambda now: 1.0 if now < 200_000 else 1.5
    calls = [lambda: cuda.run("a", 100.0)] * 3
    us, seen = timing.CudaTimer(cuda).sustained(calls, 0.3, lambda: len(cuda.replayed))
    assert us == pytest.approx(150.0)
    assert seen == 2 + 2 * 1000  # after everything was queued: the device is at work meanwhile
    assert cuda.replayed == ["a"] * seen


def test_a_call_takes_what_the_device_takes_though_the_host_prepares_it_for_long(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = importlib.import_module("benchmarks.compiled")
    host, device = 0.0, 0.0  # until when they have work

    def call(prepared: float, computed: float) -> None:
        nonlocal host, device
        host += prepared
        device = max(device, host) + computed

    def synchronize() -> None:
        nonlocal host
        host = max(host, device)

    def event(enable_timing: bool) -> Any:
        made = SimpleNamespace()
        made.record = lambda: setattr(made, "at", max(device, host))
        made.elapsed_time = lambda other: (other.at - made.at) / 1000
        return made

    columns = {"device": partial(call, 270.0, 500.0), "host": partial(call, 700.0, 500.0)}
    with monkeypatch.context() as patched:
        patched.setattr(compiled.torch, "cuda", SimpleNamespace(Event=event, synchronize=synchronize))
        times = compiled.device_times(columns, 3)
    assert times == {"device": [500.0] * 3, "host": [700.0] * 3}
