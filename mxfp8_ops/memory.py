"""Large pages for large tensors of CPUs."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

LARGE_BYTES = 8 << 20
"""Of a tensor, from which on its pages are to be large ones: some of these fit in whole, wherever it begins."""

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # only on Linux
_madvise = None if _ADVICE is None else ctypes.CDLL(None).madvise
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def in_large_pages(new: Tensor) -> Tensor:
    """``new``, which is contiguous and about to be written, most likely to memory that nobody has used yet.

    Memory is mapped where it is first touched, 4 KiB at a time, which takes longer than writing it. Reading it again
    takes longer, too, as CPUs remember where only few pages are. Linux maps 2 MiB at a time if it is asked to, and if
    it has them.
    """
    if new.nbytes < LARGE_BYTES or _madvise is None or type(new) is not Tensor or new.device.type != "cpu":
        return new
    begin, page = new.data_ptr(), mmap.PAGESIZE
    first, last = -(-begin // page) * page, (begin + new.nbytes) // page * page  # what is at the ends belongs to others
    _madvise(first, last - first, _ADVICE)  # if not, it is slower
    return new
