"""R on the CPU: compiled for the best instruction set, like the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from mxfp8_ops.cpu import build, library

SOURCE = Path(__file__).parent / "reading.cpp"


def reader() -> Callable[..., int] | None:
    """``read_words(address, count of 8-byte words, streams, threads)``; None where it cannot be compiled."""
    name = library.supported()[0]
    try:
        function = build.load(f"read-{name}", library.LEVELS[name].flags, 0, SOURCE).read_words
    except build.BuildError:
        return None
    function.restype = ctypes.c_int64
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    return function
