"""From the codes of a weight as it is stored, in shared memory, to registers, as Hopper's matrix instruction takes its
operand A.

A tile is 64 or 128 rows of the weight by 64 elements of K, swizzled by TMA. A lane reads two elements at a time,
without bank conflicts: the instruction's order of K leaves it no longer runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fragments import each_twice, halves, two_bytes
from .scaled_codes import factors_of_scales, scaled_elements
from .versions import reinterpret


@gluon.jit
def scale_places(scales, column, N, K, ROWS: gl.constexpr, MMA: gl.constexpr):
    """Pointers to the first word of scales, of four codes, of each row of a tile: ``scales [N, K / 128]``. A lane has
    those of its rows; rows past the end are the last one again.
    """
    groups = gl.reshape(_any_pairs(ROWS, MMA), [ROWS, 2, 16])
    row = column + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, groups.type.layout)))
    return scales + gl.minimum(row, N - 1).to(gl.int64) * (K // 128)


@gluon.jit
def canonical_fragment(codes, scales, HALF: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr, DTYPE: gl.constexpr):
    """Operand A ``[ROWS, 64]`` in DTYPE: the half (0 or 1) of a block's elements whose ``codes`` these are, in shared
    memory, times the block's ``scales``, words in registers.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PAIR: gl.constexpr = _any_pairs(ROWS, MMA).type.layout
    pairs = reinterpret(codes, gl.int16, [ROWS, 32], gl.NVMMASharedLayout(64, 16, 2)).load(PAIR)
    one, other = factors_of_scales(two_bytes(scales, 2 * HALF, 2 * HALF + 1, 2), DTYPE)
    words = scaled_elements(pairs, _of_pairs(one, pairs), _of_pairs(other, pairs), DTYPE)
    low, high = halves(words)
    tile = gl.reshape(gl.join(low, high), [ROWS, 64])
    return gl.convert_layout(tile.to(DTYPE, bitcast=True), OPERAND, assert_trivial=True)


@gluon.jit
def _any_pairs(ROWS: gl.constexpr, MMA: gl.constexpr):
    """Some pairs ``[ROWS, 32]`` in the layout that makes their elements lie as the operand wants them."""
    tile = gl.full([ROWS, 64], 0, gl.int8, gl.DotOperandLayout(0, MMA, 2))
    pair, _ = gl.split(gl.reshape(tile, [ROWS, 32, 2]))
    return pair


@gluon.jit
def _of_pairs(factors, pairs):
    """What the pairs of each row are multiplied by: the lower half of its factors, twice, for the first group of 32
    elements, the upper half for the second.
    """
    ROWS: gl.constexpr = pairs.shape[0]
    groups = gl.reshape(pairs, [ROWS, 2, 16])
    first, second = each_twice(factors)
    both = gl.convert_layout(gl.join(first, second), gl.SliceLayout(2, groups.type.layout), assert_trivial=True)
    both, _ = gl.broadcast(gl.expand_dims(both, 2), groups)
    return gl.convert_layout(gl.reshape(both, [ROWS, 32]), pairs.type.layout, assert_trivial=True)
