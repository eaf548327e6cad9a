"""Sums of warps that stand along K, as the older matrix instruction leaves them in registers, in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .partial_sums import as_tile, in_order_of_registers

_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def sum_of_warps(total):
    """``[BN, BM]`` from ``total [ALONG, BN, BM]``, of which every warp has its own ``[BN, BM]`` or a part of that.

    A warp's sums go to shared memory in the order of registers: the four elements of a lane follow each other, and then
    those of the next lane. From there each lane takes the same few of all warps. Both moves are wide and meet no bank
    twice; ``gl.sum`` moves single elements, and shuffles: up to a microsecond more.
    """
    ALONG: gl.constexpr = total.shape[0]
    BN: gl.constexpr = total.shape[1]
    BM: gl.constexpr = total.shape[2]
    if ALONG == 1:
        return gl.reshape(total, [BN, BM])
    else:
        rows = in_order_of_registers(total)
        shared = gl.allocate_shared_memory(gl.float32, rows.shape, _ROW)
        shared.store(rows)
        sums = gl.sum(shared.load(_in_each_lane(ALONG, BN * BM, gl.num_warps())), 0)
        return as_tile(sums, BN, BM)


@gluon.constexpr_function
def _in_each_lane(along, size, warps):
    """All warps' parts of the same sums: as many as there are for a lane, but no more than 16 bytes at a time."""
    together = min(max(size // (32 * warps), 1), 4)
    return gl.BlockedLayout([along, together], [1, 32], [1, warps], [1, 0])
