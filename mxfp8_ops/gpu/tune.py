"""Choosing a kernel's configuration by measuring, where ``MXFP8_AUTOTUNE`` is on.

What was measured is remembered in memory, and on disk in one small file a problem, so that processes never have to
agree on a file's content: each is written whole and moved into its place. Everything on which the answer depends is in
the file's name, as a hash, and in the file, to be read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import statistics
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from .. import cache, settings

Config = TypeVar("Config")

ROUNDS = 7
"""Times that every configuration is measured; the median counts."""

_log = logging.getLogger(__name__)
_chosen: dict[tuple[str, Hashable, str], Any] = {}
_measuring = threading.RLock()
_warned: set[Path] = set()


def best(
    family: str,
    key: Hashable,
    candidates: Sequence[Config],
    default: Config,
    run: Callable[[Config], object],
) -> Config:
    """The fastest configuration of a kernel for a problem: ``default``, unless tuning is on.

    Args:
        family: the kernel's name.
        key: the problem, by whatever the answer depends on beside the device: N, K, a bucket of M, dtype. Its repr
            names it on disk.
        candidates: configurations, with reprs that tell them apart; ``default`` is measured as well.
        run: launches the kernel on the current stream, any number of times. Configurations for which it raises are
            passed over.
    """
    if not settings.autotune():
        return default
    device = _device()
    known = (family, key, device)
    if known in _chosen:
        return _chosen[known]
    if torch.cuda.is_current_stream_capturing():
        return default
    with _measuring:
        if known not in _chosen:
            _chosen[known] = _find(family, key, device, {repr(c): c for c in (default, *candidates)}, default, run)
    return _chosen[known]


def _find(
    family: str,
    key: Hashable,
    device: str,
    named: dict[str, Config],
    default: Config,
    run: Callable[[Config], object],
) -> Config:
    problem = _problem(family, key, device, list(named))
    stored = _load(problem)
    if stored is not None:
        return named[stored]
    times = measure(named, run)
    if not times:
        _log.warning("no configuration of %s runs for %r: the default is used", family, key)
        return default
    fastest = min(times, key=times.__getitem__)
    _log.info("%s for %r: %s (%.1f us)", family, key, fastest, times[fastest])
    _store(problem, fastest, times)
    return named[fastest]


# --- measuring ------------------------------------------------------------------------------------------


def measure(named: dict[str, Config], run: Callable[[Config], object]) -> dict[str, float]:
    """Median microseconds of each configuration that runs, each time after its inputs have left the cache."""
    runs = {}
    for name, config in named.items():
        try:
            run(config)
            torch.cuda.synchronize()
        except Exception as error:  # whatever compilers and drivers raise for what does not fit the chip
            _log.debug("%s does not run: %s", name, error)
            continue
        runs[name] = config
    times: dict[str, list[float]] = {name: [] for name in runs}
    flush = _flusher()
    for _ in range(ROUNDS):  # all once, then all again: a clock that changes changes for all
        for name, config in runs.items():
            times[name].append(_microseconds(functools.partial(run, config), flush))
    return {name: statistics.median(measured) for name, measured in times.items()}


def _microseconds(run: Callable[[], object], flush: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()  # takes the device longer than the host takes to launch what follows: no wait for the host is measured
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _flusher() -> Callable[[], object]:
    """Writes four times as much as the cache holds, 60 us on an H100."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(max(4 * size, 1 << 26), dtype=torch.uint8, device="cuda").zero_


def _device() -> str:
    return _device_name(torch.cuda.current_device())


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


# --- on disk --------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the chosen configurations lie."""
    return cache.folder("tuning")


def _problem(family: str, key: Hashable, device: str, names: list[str]) -> dict[str, Any]:
    from .. import __version__

    return {
        "family": family,
        "key": repr(key),
        "device": device,
        "versions": [__version__, torch.__version__, triton.__version__],
        "candidates": sorted(names),
    }


def _path(problem: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(problem, sort_keys=True).encode()).hexdigest()
    return folder() / f"{problem['family']}-{digest[:24]}.json"


def _load(problem: dict[str, Any]) -> str | None:
    """The name of the configuration chosen for a problem, if some process has stored one."""
    path = _path(problem)
    try:
        stored = json.loads(path.read_text())
        if stored["problem"] != problem or stored["chosen"] not in problem["candidates"]:
            raise ValueError("it holds something else")
        return str(stored["chosen"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn_once(f"{path} cannot be read ({error})")
        return None


def _store(problem: dict[str, Any], chosen: str, times: dict[str, float]) -> None:
    content = {"problem": problem, "chosen": chosen, "microseconds": times}
    path = _path(problem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with cache.replacing(path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1))
    except OSError as error:
        _warn_once(f"{path} cannot be written ({error})")


def _warn_once(what: str) -> None:
    """One warning a folder, however many of its files are bad."""
    place = folder()
    if place not in _warned:
        _warned.add(place)
        warnings.warn(f"MXFP8's cache of tuned configurations is ignored: {what}", stacklevel=2)
