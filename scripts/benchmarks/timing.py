"""Timing calls side by side, and what is made of the times."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

_Seen = TypeVar("_Seen")
Call: TypeAlias = Callable[[], object]
Calls: TypeAlias = Sequence[Call]
"""The same call on weights that together are larger than the caches."""

GRAPH_MICROSECONDS = 500
"""What one replay takes at least, so that the gaps between graphs do not count."""
MOST_ROTATIONS = 32
HOST_CALLS = 200
"""Launched in a row: fewer than fit into the device's queue, so that the host never waits."""
HOST_BATCHES = 9
ROUND_SECONDS = 0.05
"""What a column takes in a round on the CPU at least, if it can with every weight once."""


class Timer(Protocol):
    def interleaved(self, columns: Mapping[str, Calls], replays: int) -> dict[str, list[float]]:
        """Microseconds of a call of every column, in as many rounds: in each, one column after the other."""

    def host(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Microseconds of the host's time in each call, the least of several batches."""

    def sustained(self, calls: Calls, seconds: float, watch: Callable[[], _Seen]) -> tuple[float, _Seen]:
        """Microseconds of a call that nothing interrupts, after as many seconds and for as many, and what ``watch``
        says meanwhile.
        """


def summary(samples: Sequence[float]) -> dict[str, float]:
    """``us``, the median, and ``spread``, the interquartile range in percent of it."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (median,) * 3
    return {"us": round(median, 4), "spread": round(100 * (high - low) / median, 2)}


def ratio(samples: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long as the others, the median over rounds, in each of which both were measured: what slows the
    machine down for a round slows both.
    """
    return round(statistics.median(one / other for one, other in zip(samples, others, strict=True)), 4)


def cliffs(times: Mapping[int, float]) -> dict[int, float]:
    """For every M, its time over the smaller one of its neighbours' in ``times``."""
    rows = sorted(times)
    ratios = {}
    for i, m in enumerate(rows):
        neighbours = [times[other] for other in rows[max(0, i - 1) : i + 2] if other != m]
        if neighbours:
            ratios[m] = times[m] / min(neighbours)
    return ratios


class CudaTimer:
    """Times CUDA graphs, which hold every call of a column once or several times.

    All rounds are queued before the first result is read, so that the device never waits for the host.

    Args:
        cuda: the module ``torch.cuda``.
        settle: what is done before each column, on nobody's time.
    """

    def __init__(self, cuda: Any, settle: Call = lambda: None) -> None:
        self._cuda = cuda
        self._settle = settle
        self._stream = cuda.Stream()

    def interleaved(self, columns: Mapping[str, Calls], replays: int) -> dict[str, list[float]]:
        self._cuda.synchronize()
        with self._cuda.stream(self._stream):
            for calls in columns.values():  # compiles, and makes what libraries keep for a stream
                for call in calls:
                    call()
            self._cuda.synchronize()
            pool = self._cuda.graph_pool_handle()  # no two graphs run at once, so they can share memory
            graphs = {name: self._capture(calls, 1, pool) for name, calls in columns.items()}
            rotations = {name: self._rotations(graph) for name, graph in graphs.items()}
            longer = {
                name: graphs[name] if rotations[name] == 1 else self._capture(calls, rotations[name], pool)
                for name, calls in columns.items()
            }
            for graph in longer.values():
                graph.replay()
            rounds = [{name: self._settled(graph) for name, graph in longer.items()} for _ in range(replays)]
            self._cuda.synchronize()
        times = {
            name: [_microseconds(*events[name]) / len(calls) / rotations[name] for events in rounds]
            for name, calls in columns.items()
        }
        del graphs, longer
        self._cuda.empty_cache()
        return times

    def host(self, calls: Mapping[str, Call]) -> dict[str, float]:
        for call in calls.values():
            call()
        best = dict.fromkeys(calls, math.inf)
        for _ in range(HOST_BATCHES):
            for name, call in calls.items():
                self._cuda.synchronize()
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) * 1e6 / HOST_CALLS)
        self._cuda.synchronize()
        return best

    def sustained(self, calls: Calls, seconds: float, watch: Callable[[], _Seen]) -> tuple[float, _Seen]:
        self._cuda.synchronize()
        with self._cuda.stream(self._stream):
            for call in calls:
                call()
            self._cuda.synchronize()
            graph = self._capture(calls, 1, self._cuda.graph_pool_handle())
            count = math.ceil(seconds * 1e6 / self._takes(graph))
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            for event in (start, end):
                for _ in range(count):
                    graph.replay()
                event.record()
            start.synchronize()
            seen = watch()
            self._cuda.synchronize()
        return _microseconds(start, end) / count / len(calls), seen

    def _capture(self, calls: Calls, rotations: int, pool: Any) -> Any:
        graph = self._cuda.CUDAGraph()
        graph.capture_begin(pool=pool)  # not torch.cuda.graph, which empties the allocator's cache every time
        try:
            for _ in range(rotations):
                _ = [call() for call in calls]  # kept for so long, so that results rotate through memory as well
        finally:
            graph.capture_end()
        return graph

    def _rotations(self, graph: Any) -> int:
        return min(MOST_ROTATIONS, math.ceil(GRAPH_MICROSECONDS / self._takes(graph)))

    def _takes(self, graph: Any) -> float:
        """Microseconds of a replay, the second one."""
        graph.replay()
        events = self._replay(graph)
        self._cuda.synchronize()
        return _microseconds(*events)

    def _settled(self, graph: Any) -> tuple[Any, Any]:
        self._settle()
        return self._replay(graph)

    def _replay(self, graph: Any) -> tuple[Any, Any]:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        return start, end


def _microseconds(start: Any, end: Any) -> float:
    return start.elapsed_time(end) * 1000


class CpuTimer:
    """Times calls by the clock. In every round a column goes on with the weights that come after those it has had, and
    columns begin apart, so that none finds in the caches what another has just read.
    """

    def interleaved(self, columns: Mapping[str, Calls], replays: int) -> dict[str, list[float]]:
        counts = {name: self._count(calls) for name, calls in columns.items()}
        firsts = {name: i * len(calls) // len(columns) for i, (name, calls) in enumerate(columns.items())}
        turns = {
            name: itertools.cycle([*calls[firsts[name] :], *calls[: firsts[name]]]) for name, calls in columns.items()
        }
        times: dict[str, list[float]] = {name: [] for name in columns}
        for i in range(replays):
            for name in list(columns)[:: 1 if i % 2 == 0 else -1]:  # none always comes after the same one
                times[name].append(self._microseconds(itertools.islice(turns[name], counts[name]), counts[name]))
        return times

    def host(self, calls: Mapping[str, Call]) -> dict[str, float]:
        best = dict.fromkeys(calls, math.inf)
        for _ in range(HOST_BATCHES):
            for name, call in calls.items():
                best[name] = min(best[name], self._microseconds([call] * HOST_CALLS, HOST_CALLS))
        return best

    def sustained(self, calls: Calls, seconds: float, watch: Callable[[], _Seen]) -> tuple[float, _Seen]:
        turns = itertools.cycle(calls)
        next(turns)()
        count = math.ceil(seconds * 1e6 / self._microseconds(itertools.islice(turns, 1), 1))
        self._microseconds(itertools.islice(turns, count), count)
        return self._microseconds(itertools.islice(turns, count), count), watch()

    def _count(self, calls: Calls) -> int:
        """Calls in a round. The first one compiles."""
        calls[0]()
        seconds = self._microseconds(calls[-1:], 1) / 1e6
        return max(1, min(len(calls), math.ceil(ROUND_SECONDS / seconds)))

    def _microseconds(self, calls: Iterable[Call], count: int) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / count
