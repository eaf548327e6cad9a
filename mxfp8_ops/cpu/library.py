"""The kernels as functions: which instruction sets this machine can run, and the library for one of them.

A level is an instruction set for which all kernels are compiled from the same source. The best one is taken, unless
``MXFP8_CPU_LEVEL`` names another.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import environment, settings
from . import build

ABI = 3
"""What ``mxfp8_abi()`` in the source returns: to be raised there and here when a function changes."""

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mxfp8_abi": (_INT, ()),
    # weight, scale, out, blocks, dtype, threads
    "mxfp8_dequant": (None, (_POINTER, _POINTER, _POINTER, _INT64, _INT, _INT)),
    # x, weight, scale, blocks, dtype, rule, threads
    "mxfp8_quantize": (None, (_POINTER, _POINTER, _POINTER, _INT64, _INT, _INT, _INT)),
    # x, its row stride, weight, scale, bias, out, m, n, k, dtype, threads
    "mxfp8_linear": (_INT, (_POINTER, _INT64, *(_POINTER,) * 4, _INT64, _INT64, _INT64, _INT, _INT)),
}
"""Result and arguments of every function, by its name in C."""


@dataclass(frozen=True)
class Level:
    """An instruction set, by the features of a CPU as Linux names them."""

    name: str
    features: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """What compilers call the features."""
        return tuple(f"-m{name.replace('amx_', 'amx-').replace('_', '')}" for name in self.features)


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_DOTS = (*_AVX512, "avx512vbmi", "avx512_bf16")
LEVELS = {
    level.name: level
    for level in (
        Level("amx_bf16", (*_DOTS, "amx_tile", "amx_bf16")),
        Level("avx512_bf16", _DOTS),
        Level("avx512", _AVX512),
        Level("avx2", _AVX2),
        Level("generic", ()),
    )
}
"""By name, the best first."""

_log = logging.getLogger(__name__)
_loading = threading.RLock()
_loaded: dict[str, ctypes.CDLL] = {}
_current: dict[str | None, ctypes.CDLL | None] = {}


def current() -> ctypes.CDLL | None:
    """The kernels of the level in force; None, after one warning, where they cannot be built. Cheap after the first
    call, and a change of the variable counts at the next one.

    Raises:
        ValueError: ``MXFP8_CPU_LEVEL`` is set to no level, or to one that this machine cannot run.
    """
    word = settings.cpu_level()
    try:
        return _current[word]
    except KeyError:
        return _choose(word)


def level() -> str | None:
    """The name of the level in force, None where the reference computes. Raises as ``current`` does."""
    return getattr(current(), "mxfp8_level", None)


def _choose(word: str | None) -> ctypes.CDLL | None:
    names = supported() if word is None else (forced(word),)
    with _loading:
        if word not in _current:
            _current[word] = _first(names)
        return _current[word]


def _first(names: tuple[str, ...]) -> ctypes.CDLL | None:
    """A compiler may be too old for the best level."""
    failures = []
    for name in names:
        try:
            return load(name)
        except build.BuildError as error:
            _log.info("no kernels for %s: %s", name, error)
            failures.append(error)
    warnings.warn(
        f"MXFP8 runs on the slow reference: its kernels for CPUs cannot be built ({failures[0]})", stacklevel=2
    )
    return None


def load(name: str) -> ctypes.CDLL:
    """The kernels of a level, loaded once in a process.

    Raises:
        ValueError: there is no such level, or this machine cannot run it. BuildError: it cannot be built.
    """
    with _loading:
        if name not in _loaded:
            level = LEVELS[forced(name)]
            library = build.load(level.name, level.flags, ABI)
            for function, (result, arguments) in FUNCTIONS.items():
                found = getattr(library, function)
                found.restype, found.argtypes = result, arguments
            library.mxfp8_level = name  # type: ignore[attr-defined]
            _survive_forks(library)
            _loaded[name] = library
        return _loaded[name]


def forced(word: str) -> str:
    """The level that a word of ``MXFP8_CPU_LEVEL`` means.

    Raises:
        ValueError: none, or one that this machine cannot run.
    """
    name = word.lower()
    if name not in LEVELS:
        raise ValueError(f"{environment.CPU_LEVEL} must be one of {', '.join(LEVELS)}, got {word!r}")
    missing = [feature for feature in LEVELS[name].features if feature not in cpu_features()]
    if missing:
        raise ValueError(
            f"{environment.CPU_LEVEL} must be one of {', '.join(supported())} on this machine, got {word!r}, "
            f"for which its CPU lacks {', '.join(missing)}"
        )
    return name


def supported() -> tuple[str, ...]:
    """The levels that this machine can run, the best first."""
    return tuple(name for name, level in LEVELS.items() if cpu_features().issuperset(level.features))


@functools.cache
def cpu_features() -> frozenset[str]:
    """What the CPU can do and the system lets programs use, in Linux's words; empty where nobody says so. A virtual
    machine shows what it was given.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    found = frozenset.intersection(*flags) if flags else frozenset()
    return found if "amx_tile" not in found or _may_use_tiles() else found - {"amx_tile", "amx_bf16"}


def _may_use_tiles() -> bool:
    """Asks Linux for matrix tiles, which a process must do once: they make what is saved of a thread larger."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _survive_forks(library: ctypes.CDLL) -> None:
    """A forked process has none of the threads that GNU's OpenMP has started and would wait for them for ever, as
    torch's own operators do. So those of a thread are ended before it forks; they start again when needed.
    """
    end_threads = getattr(library, "omp_pause_resource_all", None)  # of the runtime that this library runs on
    if end_threads is not None:
        soft = 1
        os.register_at_fork(before=lambda: end_threads(soft))
