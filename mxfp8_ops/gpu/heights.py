"""Tiles that are one power of two rows of x high, or the sum of two: 160 rows are 128 and 32.

Tensors have powers of two of rows. So what there is for each row of a tile, stages of x and sums, comes in a tuple: for
the first rows, ``head_of`` the tile, and for the rows after them, where there are some. Both are multiplied by the same
weight, which is decoded once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .versions import load_box


@gluon.constexpr_function
def head_of(rows):
    """The larger power of two."""
    return 1 << rows.bit_length() - 1


@gluon.constexpr_function
def mma_layout(rows, warps):
    """Of a product with so many rows of x, or with their head where they are no power of two."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, head_of(rows), 16])


def box_rows(rows: int, m: int) -> tuple[int, int]:
    """Rows of a box of x ``[m, K]``, of a tile of so many ``rows``: of its first rows and of those after them. The
    first ones come in two boxes where x has fewer, but not of less than 8, after which the order in shared memory
    repeats.
    """
    head = head_of(rows)
    return head if m >= head else max(head // 2, 8), rows - head


@gluon.jit
def stages_of_rows(x, COUNT: gl.constexpr, PIECES: gl.constexpr, BM: gl.constexpr):
    """Memory for COUNT stages of x, each of PIECES times 64 elements of K, one after the other."""
    HEAD: gl.constexpr = head_of(BM)
    first = gl.allocate_shared_memory(x.dtype, [COUNT, PIECES * HEAD, 64], x.layout)
    if HEAD == BM:
        return (first,)
    else:
        return first, gl.allocate_shared_memory(x.dtype, [COUNT, PIECES * (BM - HEAD), 64], x.layout)


@gluon.jit
def piece_of_stage(stages, stage, PIECE: gl.constexpr, PIECES: gl.constexpr):
    """One of a stage's PIECES."""
    first = _piece(stages[0].index(stage), PIECE, PIECES)
    if len(stages) == 1:
        return (first,)
    else:
        return first, _piece(stages[1].index(stage), PIECE, PIECES)


@gluon.jit
def _piece(stage, PIECE: gl.constexpr, PIECES: gl.constexpr):
    ROWS: gl.constexpr = stage.shape[0] // PIECES
    return stage.slice(PIECE * ROWS, ROWS)


@gluon.jit
def load_rows(x, row, M, k, ready, pieces):
    """Has TMA fill pieces of a stage with the rows of x of a tile that begins with ``row``, and 64 elements of K. For
    each piece there is a descriptor of x, for they come in boxes of their own.

    TMA takes several times as long for a row of x that is not there as for one that is. So the last rows' tile is moved
    up to end with the last row: its first rows are then some of the tile before once more, and are not stored. Where a
    tile's rows come in several boxes, each of them is moved for itself.
    """
    for i in gl.static_range(len(pieces)):
        _load_boxes(x[i], row + i * pieces[0].shape[0], M, k, ready, pieces[i])


@gluon.jit
def _load_boxes(x, row, M, k, ready, piece):
    ROWS: gl.constexpr = piece.shape[0]
    BOX: gl.constexpr = x.block_type.shape[0]
    for first in gl.static_range(0, ROWS, BOX):
        load_box(x, [moved_up(row + first, M, BOX), k], ready, piece.slice(first, BOX))


@gluon.jit
def moved_up(row, M, BOX: gl.constexpr):
    """The row of x with which a box begins that should begin with ``row``: as many rows before the end at least."""
    return gl.minimum(row, gl.maximum(M - BOX, 0))


@gluon.jit
def rows_of_result(m, row, M, BOX: gl.constexpr):
    """Which row of the result each row ``m`` of a tile is that begins with ``row``, and whether it is to be stored."""
    first = row + m // BOX * BOX
    moved = moved_up(first, M, BOX) + m % BOX
    return moved, (moved >= first) & (moved < M)


@gluon.jit
def zeros(COLUMNS: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr):
    """Sums of no products."""
    HEAD: gl.constexpr = head_of(BM)
    first = gl.zeros([COLUMNS, HEAD], gl.float32, mma_layout(HEAD, WARPS))
    if HEAD == BM:
        return (first,)
    else:
        return first, gl.zeros([COLUMNS, BM - HEAD], gl.float32, mma_layout(BM - HEAD, WARPS))


@gluon.jit
def multiply(weight, pieces, sums):
    """Begins to add the products of a weight's fragment ``[COLUMNS, 64]`` with pieces of a stage of x to the sums."""
    first = _multiply(weight, pieces[0], sums[0])
    if len(sums) == 1:
        return (first,)
    else:
        return first, _multiply(weight, pieces[1], sums[1])


@gluon.jit
def _multiply(weight, piece, total):
    weight = _operand(weight, mma_layout(piece.shape[0], gl.num_warps()))
    return warpgroup_mma(weight, piece.permute((1, 0)), total, is_async=True)


@gluon.jit
def multiply_at_once(weight, pieces, sums):
    """The same on the older matrix instruction, whose sums lie in the same registers; nothing is waited for."""
    first = _multiply_at_once(weight, pieces[0], sums[0])
    if len(sums) == 1:
        return (first,)
    else:
        return first, _multiply_at_once(weight, pieces[1], sums[1])


@gluon.jit
def _multiply_at_once(weight, piece, total):
    OLDER: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    rows = piece.permute((1, 0)).load(gl.DotOperandLayout(1, OLDER, 2))
    sums = mma_v2(_operand(weight, OLDER), rows, gl.convert_layout(total, OLDER, assert_trivial=True))
    return gl.convert_layout(sums, total.type.layout, assert_trivial=True)


@gluon.jit
def _operand(weight, MMA: gl.constexpr):
    """The same registers as another instruction's operand A."""
    return gl.convert_layout(weight, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def wait_for_all_but(COUNT: gl.constexpr, sums):
    """Until all is multiplied but what was begun the last COUNT times."""
    if len(sums) == 1:
        return (warpgroup_mma_wait(COUNT, deps=[sums[0]]),)
    else:
        return warpgroup_mma_wait(COUNT * 2, deps=[sums[0], sums[1]])
