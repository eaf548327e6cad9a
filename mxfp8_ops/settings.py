"""The environment flags, read in one place, at use and never at import.

``MXFP8_DEQUANT_AT_LOAD``, else ``VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD``: on, off or unset. Who asks
decides what unset means: a module dequantizes once at load, a compiler does not fold.

``MXFP8_PASSES`` and ``MXFP8_KERNELS`` are for finding out which part gives a wrong answer: set to off, the
first leaves graphs to Inductor as they are, the second computes everything with the reference.
"""

from __future__ import annotations

import os

import torch

from . import environment
from .environment import (
    AUTOTUNE,
    CACHE_DIR,
    CPU_LEVEL,
    DEPENDENT_LAUNCH,
    DEQUANT_AT_LOAD,
    KERNELS,
    MERGE_LINEARS,
    PACK_AT_LOAD,
    PASSES,
)

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

_epoch = 0
_compile_options = ""


def dequant_at_load(override: bool | None = None) -> bool | None:
    """The load-time dequant flag: True, False, or None when unset.

    Args:
        override: beats the environment unless None.

    Raises:
        ValueError: an environment variable is set to a word that is neither on nor off.
        TypeError: ``override`` is not a bool or None.
    """
    return _flag("dequant_at_load", override, DEQUANT_AT_LOAD)


def pack_at_load(override: bool | None = None) -> bool | None:
    """Whether a compiler packs static weights for the kernels of GPUs: True, False, or None when unset, which is where
    those kernels read packed weights. ``MXFP8_PACK_AT_LOAD``.

    Args:
        override: beats the environment unless None.

    Raises:
        ValueError: the variable is set to a word that is neither on nor off. TypeError: as above.
    """
    return _flag("pack_at_load", override, (PACK_AT_LOAD,))


def merge_linears(override: bool | None = None) -> bool | None:
    """Whether a compiler merges linears on the same x into one: True, False, or None when unset, which is on GPUs.
    ``MXFP8_MERGE_LINEARS``.

    Args:
        override: beats the environment unless None.

    Raises:
        ValueError: the variable is set to a word that is neither on nor off. TypeError: as above.
    """
    return _flag("merge_linears", override, (MERGE_LINEARS,))


def _flag(name: str, override: bool | None, variables: tuple[str, ...]) -> bool | None:
    if override is not None:
        if not isinstance(override, bool):
            raise TypeError(f"{name} must be True, False or None, got {override!r}")
        return override
    return next((value for value in map(_switch, variables) if value is not None), None)


def passes() -> bool:
    """Whether the lowering may change graphs: not while ``MXFP8_PASSES`` is off.

    Raises:
        ValueError: it is set to a word that is neither on nor off.
    """
    return _switch(PASSES) is not False


def kernels() -> bool:
    """Whether anything but the reference may compute: not while ``MXFP8_KERNELS`` is off.

    Raises:
        ValueError: it is set to a word that is neither on nor off.
    """
    return _switch(KERNELS) is not False


def autotune() -> bool:
    """Whether kernels' configurations are measured: only while ``MXFP8_AUTOTUNE`` is on.

    Raises:
        ValueError: it is set to a word that is neither on nor off.
    """
    return _switch(AUTOTUNE) is True


def dependent_launch() -> bool:
    """Whether kernels for Hopper may start before the one before them has ended (CUDA's programmatic dependent launch):
    only while ``MXFP8_DEPENDENT_LAUNCH`` is on.

    Raises:
        ValueError: it is set to a word that is neither on nor off.
    """
    return _switch(DEPENDENT_LAUNCH) is True


def launch() -> tuple[bool, bool, bool] | None:
    """``kernels()``, ``autotune()`` and ``dependent_launch()``; None where none of their variables is set.

    Raises:
        ValueError: one is set to a word that is neither on nor off.
    """
    return None if environment.launch_surely_unset() else (kernels(), autotune(), dependent_launch())


def cache_dir() -> str | None:
    """``MXFP8_CACHE_DIR``: the folder of this package's caches, None when unset or empty."""
    return os.environ.get(CACHE_DIR) or None


def cpu_level() -> str | None:
    """``MXFP8_CPU_LEVEL``: the instruction set that CPU kernels are to use, None when unset. Which words mean one,
    ``cpu.library`` knows.
    """
    return None if environment.surely_unset(CPU_LEVEL) else os.environ.get(CPU_LEVEL)


def _switch(name: str) -> bool | None:
    if environment.surely_unset(name):
        return None
    word = os.environ.get(name)
    if word is None:
        return None
    if word.lower() not in _WORDS:
        raise ValueError(f"{name} must be 1/true/yes/on or 0/false/no/off, got {word!r}")
    return _WORDS[word.lower()]


def guard_compiled_graph() -> None:
    """Called while Dynamo traces an operator: reads whatever the compilation depends on, so that Dynamo
    guards the graph on it. (A value must be compared: what is only read, Dynamo does not guard.) Does
    nothing in eager mode.
    """
    if torch.compiler.is_compiling():
        _ = environment.words == "", _epoch == 0, _compile_options == ""


def invalidate_compiled() -> None:
    """Makes every compiled graph that calls this package's functions be compiled again at its next call."""
    global _epoch
    _epoch += 1


def set_compile_options(*options: object) -> None:
    """Records process-wide lowering options; graphs compiled under others are compiled again."""
    global _compile_options
    _compile_options = repr(options)
