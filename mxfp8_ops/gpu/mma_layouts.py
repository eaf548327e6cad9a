"""Which lane holds what in ``mma_kernel`` and ``vectors``, and where it finds that.

Of 16 elements of K that an instruction multiplies, lane t of four holds 2t, 2t + 1, 2t + 8 and 2t + 9. Here these are
four consecutive elements in memory, and those of RUN / 4 instructions follow each other. The bits of an element's
number along K, the highest first:

    in memory             chunk of 4 * RUN | lane 4 | instruction RUN / 4 | half 2 | 2
    for the instructions  chunk of 4 * RUN | instruction RUN / 4 | half 2 | lane 4 | 2
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fragments import halves
from .places import places_along

RUN = gl.constexpr(16)
"""Consecutive elements of a row that a lane takes: 16 bytes of the weight."""


@gluon.jit
def _in_order_of_instruction(tile):
    """``[ALONG, rows, BK]`` with K in the order of memory, in the order of instructions. Moves nothing."""
    bits = gl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // (4 * RUN), 4, RUN // 4, 2, 2])
    return gl.reshape(gl.permute(bits, (0, 1, 2, 4, 5, 3, 6)), tile.shape)


@gluon.jit
def _by_halves_of_turn(tile, TOGETHER: gl.constexpr):
    """``[ALONG, rows, BK]`` with the two halves of K below each other, of each TOGETHER rows: ``[ALONG, 2 * rows, BK /
    2]``. So eight rows of the weight are the 16 of operand A, and four rows of x the eight columns of operand B, if
    GROUPS are 2: where the halves are not the same, products mean nothing.
    """
    ROWS: gl.constexpr = tile.shape[1]
    HALF: gl.constexpr = tile.shape[2] // 2
    bits = gl.reshape(tile, [tile.shape[0], ROWS // TOGETHER, TOGETHER, 2, HALF])
    return gl.reshape(gl.permute(bits, (0, 1, 3, 2, 4)), [tile.shape[0], 2 * ROWS, HALF])


@gluon.jit
def weight_operand(elements, SHAPE: gl.constexpr, MMA: gl.constexpr, DTYPE: gl.constexpr, GROUPS: gl.constexpr = 1):
    """The four ``elements`` of each word of a tile of the weight as operand A; SHAPE is the tile's, ``[ALONG, BN,
    BK]``.
    """
    k0, k1, k2, k3 = elements
    tile = gl.reshape(gl.join(gl.join(k0, k2), gl.join(k1, k3)), SHAPE)
    tile = _in_order_of_instruction(tile.to(DTYPE, bitcast=True))
    if GROUPS == 2:
        tile = _by_halves_of_turn(tile, 8)
    return gl.convert_layout(tile, gl.DotOperandLayout(0, MMA, 2))  # the same lanes: only names of registers change


@gluon.jit
def x_operand(pairs, MMA: gl.constexpr, DTYPE: gl.constexpr, GROUPS: gl.constexpr = 1):
    """Pairs of elements of x ``[ALONG, BM, BK / 2]`` as operand B."""
    one, other = halves(pairs)
    rows = gl.reshape(gl.join(one, other), [pairs.shape[0], pairs.shape[1], pairs.shape[2] * 2])
    rows = _in_order_of_instruction(rows.to(DTYPE, bitcast=True))
    if GROUPS == 2:
        rows = _by_halves_of_turn(rows, 4)
    return gl.convert_layout(gl.permute(rows, (0, 2, 1)), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def first_places(
    base,
    first,
    rows,
    K,
    ALONG: gl.constexpr,
    SIZE: gl.constexpr,
    BK: gl.constexpr,
    HELD: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Pointers ``[ALONG, SIZE, BK / HELD]`` to what the first turn takes of SIZE rows of a matrix, whose items hold
    HELD elements of K each.

    Rows past the end are the last one again, and are not stored: loads without masks are faster. K is a multiple of 32,
    and of HELD: saying so keeps them wide.
    """
    UNIT: gl.constexpr = 128 if HELD == 128 else 32
    row = gl.minimum(first + places_along(SIZE, 1, 3, LAYOUT), rows - 1).to(gl.int64)
    return base + row * (K // UNIT * (UNIT // HELD)) + places_in_turn(ALONG, BK, HELD, LAYOUT)


@gluon.jit
def places_in_turn(ALONG: gl.constexpr, BK: gl.constexpr, HELD: gl.constexpr, LAYOUT: gl.constexpr):
    """Places along K ``[ALONG, 1, BK / HELD]`` within a turn: the warps' parts follow each other."""
    return places_along(ALONG, 0, 3, LAYOUT) * (BK // HELD) + places_along(BK // HELD, 2, 3, LAYOUT)


@gluon.constexpr_function
def weight_layout(HELD, BN, BK, MMA, GROUPS=1):
    """Of ``[ALONG, BN, BK / HELD]`` items of the weight that hold HELD elements of K each. A lane's registers are
    numbered along K first: loads are wide only so. GROUPS: see ``_by_halves_of_turn``.
    """
    along, across, _ = MMA.warps_per_cta
    other = [0, 8, 0] if GROUPS == 1 else [0, 0, BK // 2 // HELD]
    more = [[0, step, 0] for step in _powers(16 // GROUPS * across, BN)]
    registers = [*_along_k(HELD, BK // GROUPS), other, *more]
    lanes = [[0, 0, RUN.value // HELD], [0, 0, 2 * RUN.value // HELD], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = [[0, step, 0] for step in _powers(16, 16 * across)] + [[step, 0, 0] for step in _powers(1, along)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [along, BN, BK // HELD])


@gluon.constexpr_function
def x_layout(HELD, BM, BK, MMA, GROUPS=1):
    """Of ``[ALONG, BM, BK / HELD]`` items of x: warps that stand next to each other along N hold the same."""
    along, across, _ = MMA.warps_per_cta
    other = [0, 4, 0] if GROUPS == 1 else [0, 0, BK // 2 // HELD]
    registers = _along_k(HELD, BK // GROUPS) + [[0, step, 0] for step in _powers(8 // GROUPS, BM)]
    lanes = [[0, 0, RUN.value // HELD], [0, 0, 2 * RUN.value // HELD], [0, 1, 0], [0, 2, 0], other]
    warps = [[0, 0, 0] for _ in _powers(1, across)] + [[step, 0, 0] for step in _powers(1, along)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [along, BM, BK // HELD])


@gluon.constexpr_function
def _along_k(held, elements):
    """What a lane holds of K: a run of each chunk of four."""
    return [[0, 0, step // held] for step in _powers(held, RUN.value) + _powers(4 * RUN.value, elements)]


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
def swizzled(HELD, BK):
    """Of items ``[ALONG, rows, BK / HELD]`` in shared memory. Lanes that read at the same time, of two rows or four,
    find their words in different banks.
    """
    words = BK // HELD  # a row's
    if HELD == 2:  # 16 bytes at a time, of every other 16 bytes: the next row has the others
        return gl.SwizzledSharedLayout(4, 1, 2, [2, 1, 0])
    together = 4 * RUN.value // HELD  # words of a row that four lanes read
    return gl.SwizzledSharedLayout(together, max(1, 32 // words), words // together, [2, 1, 0])


@gluon.constexpr_function
def group_layout(WORD, HELD=32):
    """Of scales ``[ALONG, BN, BK / HELD]``, items of those of HELD elements: a lane holds those of its words."""
    ALONG, BN, words = WORD.shape
    each = HELD // 4
    registers, lanes, warps = (
        [[along, row, 0, word] if word < each else [along, row, word // each, 0] for along, row, word in bases]
        for bases in (WORD.reg_bases, WORD.lane_bases, WORD.warp_bases)
    )
    by_group = gl.DistributedLinearLayout(registers, lanes, warps, [], [ALONG, BN, words // each, each])
    return gl.SliceLayout(3, by_group)
