"""Kernels for CUDA devices, in Triton, imported when the first of them is called."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType


@functools.cache
def kernels() -> ModuleType | None:
    """``dispatch``, or None, after one warning, where Triton cannot be imported: the reference computes then."""
    try:
        from . import dispatch
    except ImportError as error:
        warnings.warn(f"MXFP8 runs on the slow reference: Triton cannot be imported ({error})", stacklevel=2)
        return None
    return dispatch
