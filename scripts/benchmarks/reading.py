"""R: a kernel that reads memory as fast as can be, and does nothing else."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def read(words: Tensor, elements: int, steps: int) -> None:
    """Reads an int32 tensor, in programs of ``steps`` times ``elements`` words."""
    grid = (triton.cdiv(words.numel(), elements * steps),)
    read_kernel[grid](words, words.numel(), ELEMENTS=elements, STEPS=steps, num_warps=elements // 512)


@triton.jit
def read_kernel(words, count, ELEMENTS: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * ELEMENTS * STEPS
    offset = start + tl.arange(0, ELEMENTS)
    total = tl.zeros((ELEMENTS,), tl.int32)
    for step in tl.static_range(STEPS):
        at = offset + step * ELEMENTS
        total ^= tl.load(words + at, mask=at < count, other=0, eviction_policy="evict_first")
    result = tl.sum(total, 0)
    if result == 0x12345678:  # the compiler must believe that somebody wants to know
        tl.store(words + start, result)
