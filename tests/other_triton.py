"""Compiles a share I of N of the kernels in Gluon for Hopper, with the Triton that is found first, without a device:
``python other_triton.py I/N``. Prints Triton's version, and each kernel with the bytes that it spills.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from compiling import DTYPES, check_fits, check_loads, check_waits, compiled_at_an_end, tiled_kernels

from mxfp8_ops.gpu import plans, plans_few, plans_vectors
from mxfp8_ops.gpu.kinds_few import Vectors


def kernels() -> Iterator[tuple[Any, bool, torch.dtype, int]]:
    """Each in one dtype and one form of the weight, and how many programs of it a multiprocessor has room for. Whoever
    takes every second one has all forms and dtypes among them.
    """
    orders = DTYPES, DTYPES[::-1]
    for few, dtype in zip(plans_few.COSTS, itertools.cycle(itertools.chain(*orders))):
        yield few, True, dtype, few.at_once
    for vectors, dtype in zip(plans_vectors.COSTS, itertools.cycle(itertools.chain(*orders))):
        yield vectors, False, dtype, vectors.at_once
    forms = [(packed, dtype) for dtypes in orders for packed in (True, False) for dtype in dtypes]
    for tiled, (packed, dtype) in zip(tiled_kernels(False), itertools.cycle(forms)):
        at_once = plans.TABLE[tiled].at_once if isinstance(tiled, plans.Skinny) else 1
        yield tiled, packed, dtype, at_once


def main(share: str) -> None:
    print(triton.__version__)
    first, step = map(int, share.split("/"))
    for kernel, packed, dtype, at_once in itertools.islice(kernels(), first, None, step):
        with tempfile.TemporaryDirectory() as folder:
            found = compiled_at_an_end(kernel, packed, dtype, Path(folder))
        check_fits(found, at_once)
        if not isinstance(kernel, Vectors):  # which is never launched as a dependent one
            check_waits(found)
        if isinstance(kernel, plans.Skinny | plans.Wide):
            check_loads(found)
            assert "serialized" not in found.log, found.log
        print(kernel, "packed" if packed else "canonical", dtype, found.spilled)


if __name__ == "__main__":
    main(sys.argv[1])
