"""Which lane holds what in ``mma_kernel``.

Of 16 elements of K that an instruction multiplies, lane t of four holds 2t, 2t + 1, 2t + 8 and 2t + 9. Here these are
four consecutive elements in memory, and those of RUN / 4 instructions follow each other. The bits of an element's
number along K, the highest first:

    in memory             chunk of 4 * RUN | lane 4 | instruction RUN / 4 | half 2 | 2
    for the instructions  chunk of 4 * RUN | instruction RUN / 4 | half 2 | lane 4 | 2
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def in_order_of_instruction(tile, RUN: gl.constexpr):
    """``[ALONG, rows, BK]`` with K in the order of memory, in the order of instructions. Moves nothing."""
    bits = gl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // (4 * RUN), 4, RUN // 4, 2, 2])
    return gl.reshape(gl.permute(bits, (0, 1, 2, 4, 5, 3, 6)), tile.shape)


@gluon.constexpr_function
def weight_layout(HELD, BN, BK, RUN, MMA):
    """Of ``[ALONG, BN, BK / HELD]`` items of the weight that hold HELD elements of K each. A lane's registers are
    numbered along K first: loads are wide only so.
    """
    along, across, _ = MMA.warps_per_cta
    registers = _along_k(HELD, BK, RUN) + [[0, 8, 0]] + [[0, step, 0] for step in _powers(16 * across, BN)]
    lanes = [[0, 0, RUN // HELD], [0, 0, 2 * RUN // HELD], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, step, 0] for step in _powers(16, 16 * across)] + [[step, 0, 0] for step in _powers(1, along)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [along, BN, BK // HELD])


@gluon.constexpr_function
def x_layout(HELD, BM, BK, RUN, MMA):
    """Of ``[ALONG, BM, BK / HELD]`` items of x: warps that stand next to each other along N hold the same."""
    along, across, _ = MMA.warps_per_cta
    registers = _along_k(HELD, BK, RUN) + [[0, step, 0] for step in _powers(8, BM)]
    lanes = [[0, 0, RUN // HELD], [0, 0, 2 * RUN // HELD], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, 0, 0] for _ in _powers(1, across)] + [[step, 0, 0] for step in _powers(1, along)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [along, BM, BK // HELD])


@gluon.constexpr_function
def _along_k(held, elements, run):
    """What a lane holds of K: a run of each chunk of four."""
    return [[0, 0, step // held] for step in _powers(held, run) + _powers(4 * run, elements)]


@gluon.constexpr_function
def _powers(first, end):
    """first, 2 * first, 4 * first, ... below end."""
    return [first << i for i in range((end // first).bit_length() - 1)]


@gluon.constexpr_function
def copy_layout(HELD, BK, MMA):
    """Of items on their way to shared memory: 16 bytes a lane."""
    lanes = BK // HELD // 4
    return gl.BlockedLayout([1, 1, 4], [1, 32 // lanes, lanes], MMA.warps_per_cta, [2, 1, 0])


@gluon.constexpr_function
def swizzled(HELD, BK, RUN):
    """Of items ``[ALONG, rows, BK / HELD]`` in shared memory. Lanes that read at the same time, of two rows or four,
    find their words in different banks.
    """
    words = BK // HELD  # a row's
    if HELD == 2 and RUN == 16:  # 16 bytes at a time, of every other 16 bytes: the next row has the others
        return gl.SwizzledSharedLayout(4, 1, 2, [2, 1, 0])
    together = 4 * RUN // HELD  # words of a row that four lanes read
    return gl.SwizzledSharedLayout(together, max(1, 32 // words), words // together, [2, 1, 0])


@gluon.constexpr_function
def group_layout(WORD):
    """Of codes of scales ``[ALONG, BN, BK / 32]``: a lane holds those of its words."""
    ALONG, BN, words = WORD.shape
    registers, lanes, warps = (
        [[along, row, 0, word] if word < 8 else [along, row, word // 8, 0] for along, row, word in bases]
        for bases in (WORD.reg_bases, WORD.lane_bases, WORD.warp_bases)
    )
    by_group = gl.DistributedLinearLayout(registers, lanes, warps, [], [ALONG, BN, words // 8, 8])
    return gl.SliceLayout(3, by_group)
