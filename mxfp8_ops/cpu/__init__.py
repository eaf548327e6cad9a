"""Kernels for CPUs, in C++, compiled when the first of them is called."""

from __future__ import annotations

from types import ModuleType

from . import dispatch, library


def kernels() -> ModuleType | None:
    """``dispatch``, or None, after one warning, where the kernels cannot be built: the reference computes then.

    Raises:
        ValueError: ``MXFP8_CPU_LEVEL`` is set to no level, or to one that this machine cannot run.
    """
    return None if library.current() is None else dispatch
