"""Names that Gluon, which is experimental, has changed from one version of Triton to the next.

The kernels compile for Hopper with Triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0; CI has the oldest, the newest, and the one
that goes with torch. They were run with 3.6, which goes with torch 2.11, and with 3.7, which goes with 2.13. Where they
do not compile, ``dispatch`` does without them.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

_Memory = gl.shared_memory_descriptor

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # before 3.7
reinterpret = _Memory.reinterpret if hasattr(_Memory, "reinterpret") else _Memory._reinterpret  # before 3.9
"""``reinterpret(memory, dtype, shape, layout)``: shared memory seen otherwise."""
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # before 3.8
"""Has TMA copy a box to shared memory."""
copy_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
"""Has every lane copy from where its pointers point, to shared memory (before 3.8 under the other name)."""
