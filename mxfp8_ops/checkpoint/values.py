"""The values of one tensor: mapped, copied into memory of their own, and no longer mapped."""

from __future__ import annotations

import mmap
from io import FileIO

import torch
from torch import Tensor

from ..memory import in_large_pages
from .errors import CheckpointError
from .headers import DTYPES, TensorInfo

EVERYTHING = slice(None)


def read_values(file: FileIO, start: int, info: TensorInfo, *part: slice) -> Tensor:
    """The tensor ``info``, which begins at byte ``start`` of ``file``; or the ``part`` of its last dimensions.

    Args:
        part: slices in steps of 1.

    Raises:
        CheckpointError: torch has no such dtype. OSError, ValueError: the file cannot be mapped, or has become shorter.
    """
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{info.dtype} is no dtype that can be read")
    size = info.bits // 8
    *outer, last = info.shape or (1,)
    stored = _mapped(file, start, info.nbytes).view(*outer, last * size)
    if part:
        whole = [EVERYTHING] * (len(info.shape) - len(part))
        stored = stored[(*whole, *part[:-1], _in_bytes(part[-1], size))]
    copied = in_large_pages(torch.empty(stored.shape, dtype=torch.uint8, device="cpu")).copy_(stored)
    *outer, count = copied.shape
    values = copied.view(-1).view(DTYPES[info.dtype]).view(*outer, count // size)
    return values if info.shape else values[0]


def _mapped(file: FileIO, start: int, count: int) -> Tensor:
    """``count`` bytes of ``file``, mapped as long as this tensor lives. They are not aligned to elements."""
    if not count:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    before = start % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(file.fileno(), before + count, access=mmap.ACCESS_COPY, offset=start - before)
    return torch.frombuffer(pages, dtype=torch.uint8, count=count, offset=before)


def _in_bytes(part: slice, size: int) -> slice:
    """``part`` of elements of ``size`` bytes, in bytes."""
    start, stop = (None if end is None else end * size for end in (part.start, part.stop))
    return slice(start, stop)
