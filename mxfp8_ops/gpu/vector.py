"""Linear for one row of x on a weight as it is stored, in Gluon: as fast as the weight's bytes can be read.

A program computes four outputs. Its warps stand along K; a lane takes 16 consecutive elements of each of four rows,
which share its 16 elements of x. Sums are float32, and for x of bfloat16 a sum of 16 products is scaled rather than
each element. That is the reference's answer unless an element would have been rounded or have become infinite, which
its scale tells, or a sum overflows before it is scaled. The scales of real weights are so small that elements are
rounded in float16; there elements are scaled, two at a time, as long as float16 has their scale. Where a result is NaN
or infinite, the program computes its outputs once more, element by element, in a way that takes few registers rather
than little time: with no more than 64 a lane, eight programs of four warps run at once on a multiprocessor.

All programs begin at about the same time, so that what they do before their first load and after their last counts as
much as the loop. K is a constant of the kernel, which makes most of a place part of an instruction; after the last
product there is one barrier, behind which every warp adds up all results, and stores them before it looks at them.

For chips that convert e4m3 themselves: NVIDIA's from sm_89 on. ``gemv`` does the same in plain Triton, for more rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .counts import REGISTERS, divided
from .fragments import float16_in_both_halves, scale_to_float32, scaled
from .gemv import FAST_SCALES
from .launch import launch
from .places import places_along

_ROWS = gl.constexpr(4)  # outputs of a program
_WARP = 32 * 16  # elements of K that a warp takes at a time
_REGISTERS = 64  # of a lane
_WARPS_AT_ONCE = REGISTERS // (_REGISTERS * 32)  # on a multiprocessor


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, processors: int) -> Tensor:
    """``x [1, K]`` bfloat16 or float16, ``weight [N, K]``, ``scale [N, K/32]``, ``bias [N]``, all contiguous, x and
    weight at multiples of 16 bytes; gives ``[1, N]``.
    """
    n, k = weight.shape
    out = torch.empty((1, n), dtype=x.dtype, device=x.device)
    warps = warps_along(n, k, processors)
    launch(
        mxfp8_linear_vector,
        (divided(n, _ROWS.value),),
        (x.view(torch.int32), weight.view(torch.int32), scale, x if bias is None else bias, out, n),
        (k, warps, *FAST_SCALES[x.dtype], bias is not None, n % _ROWS.value != 0),
        num_warps=warps,
        maxnreg=_REGISTERS,
    )
    return out


def warps_along(n: int, k: int, processors: int) -> int:
    """As many as K has work for, up to four; fewer if all programs run at once then."""
    most = 4 if k > 2 * _WARP else 2 if k > _WARP else 1
    at_once = [warps for warps in (1, 2, 4) if divided(n, _ROWS.value) * warps <= _WARPS_AT_ONCE * processors]
    return min(most, max(at_once, default=4))


# Four codes of e4m3 in a word to float16, two in a word each; and pairs of elements of x to float32.
_CODES = gl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")
_PAIR_BFLOAT16 = gl.constexpr("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }")
_PAIR_FLOAT16 = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")


# A barrier that is none, as a warp's lanes are together; but the assembler moves no loads behind it.
_LOADS_BEFORE = gl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")


@gluon.jit(do_not_specialize=["N"])
def mxfp8_linear_vector(
    x,  # pointer [K / 2] int32: two elements in a word
    weight,  # pointer [N, K / 4] int32: four elements in a word
    scale,  # pointer [N, K / 32]
    bias,  # pointer [N], or to anything
    out,  # pointer [N], of x's dtype
    N,
    K: gl.constexpr,
    WARPS: gl.constexpr,
    LOWEST: gl.constexpr,  # scales, see FAST_SCALES
    HIGHEST: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    RAGGED: gl.constexpr,  # the last program has fewer than four outputs
):
    DTYPE: gl.constexpr = out.dtype.element_ty
    first = gl.program_id(0) * _ROWS
    last = N - 1 if RAGGED else first + _ROWS - 1
    total = _products(x, weight, scale, first, last, K, DTYPE, WARPS, LOWEST, HIGHEST)
    _store(total, bias, out, first, last, HAS_BIAS)
    special = (gl.abs(total) == float("inf")) | (total != total)
    if gl.max(special.to(gl.int32), 0) != 0:
        total = _exact_products(x, weight, scale, first, last, K, DTYPE, WARPS, total)
        _store(total, bias, out, first, last, HAS_BIAS)


@gluon.jit
def _store(total, bias, out, first, last, HAS_BIAS: gl.constexpr):
    n = first + gl.arange(0, _ROWS, total.type.layout)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n <= last, other=0).to(gl.float32)
    gl.store(out + n, total.to(out.dtype.element_ty), mask=n <= last)


@gluon.jit
def _products(
    x,
    weight,
    scale,
    first,
    last,
    K: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
    LOWEST: gl.constexpr,
    HIGHEST: gl.constexpr,
):
    """The products ``[4]`` of x and of rows of the weight, NaN where a scale is not in LOWEST..HIGHEST. Rows past the
    last are that one again.
    """
    WORDS: gl.constexpr = 128 * WARPS  # of a row, in a step
    WHOLE: gl.constexpr = K // (4 * WORDS) * WORDS  # of a row, in steps of so many
    LANES: gl.constexpr = 32 * WARPS
    WORD: gl.constexpr = gl.BlockedLayout([_ROWS, 4], [1, 32], [1, WARPS], [1, 0])
    SUM: gl.constexpr = gl.BlockedLayout([_ROWS, 1], [1, 32], [1, WARPS], [1, 0])
    X: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    at = places_along(WORDS, 1, 2, WORD)
    group = places_along(LANES, 1, 2, SUM) // 2
    pair = gl.arange(0, 2 * WORDS, X)
    row = gl.minimum(places_along(_ROWS, 0, 2, WORD), last - first)
    words = weight + first.to(gl.int64) * (K // 4) + row * (K // 4) + at
    row = gl.minimum(places_along(_ROWS, 0, 2, SUM), last - first)
    scales = scale + first.to(gl.int64) * (K // 32) + row * (K // 32) + group
    pairs = x + pair
    sums = gl.zeros([_ROWS, LANES], gl.float32, SUM)
    farthest = gl.zeros([LANES], gl.uint32, gl.SliceLayout(0, SUM))
    if K == 8 * WORDS:  # two steps: registers hold all of both
        word = gl.load(words, eviction_policy="evict_first")
        code = gl.load(scales)
        other_word = gl.load(words + WORDS, eviction_policy="evict_first")
        other_code = gl.load(scales + WORDS // 8)
        values = gl.load(pairs)
        gl.inline_asm_elementwise(_LOADS_BEFORE, "=r,r", [first], gl.int32, False, 1)
        sums, farthest = _step(word, code, values, sums, farthest, DTYPE, LOWEST)
        sums, farthest = _step(other_word, other_code, gl.load(pairs + 2 * WORDS), sums, farthest, DTYPE, LOWEST)
    else:
        for start in range(0, WHOLE, WORDS):
            word = gl.load(words + start, eviction_policy="evict_first")
            code = gl.load(scales + start // 8)
            sums, farthest = _step(word, code, gl.load(pairs + start * 2), sums, farthest, DTYPE, LOWEST)
    if WHOLE * 4 < K:
        LEFT: gl.constexpr = K // 4 - WHOLE
        word = gl.load(words + WHOLE, mask=at < LEFT, other=0)
        code = gl.load(scales + WHOLE // 8, mask=group < LEFT // 8, other=127)
        values = gl.load(pairs + WHOLE * 2, mask=pair < LEFT * 2, other=0)
        sums, farthest = _step(word, code, values, sums, farthest, DTYPE, LOWEST)
    return _sum_of_lanes(gl.where((farthest > HIGHEST - LOWEST)[None, :], float("nan"), sums))


@gluon.jit
def _step(word, code, values, sums, farthest, DTYPE: gl.constexpr, LOWEST: gl.constexpr):
    """``sums [4, lanes]`` and the scaled sums of 16 products in each lane, and how far a code was from LOWEST at most,
    where codes under it count as far above it.
    """
    LANES: gl.constexpr = sums.shape[1]
    first, second = gl.split(gl.reshape(values, [LANES, 2, 2, 2]))
    word_0, word_1, word_2, word_3 = _of_each_word(gl.reshape(word, [_ROWS, LANES, 2, 2]))
    first_0, first_1, first_2, first_3 = _of_each_word(first)
    second_0, second_1, second_2, second_3 = _of_each_word(second)
    scale = code.to(gl.int32)
    factor = float16_in_both_halves(scale << 23) if gl.float16 == DTYPE else scale
    products = gl.zeros_like(sums)
    products = _add_products(products, word_0, factor, first_0, second_0, DTYPE)
    products = _add_products(products, word_1, factor, first_1, second_1, DTYPE)
    products = _add_products(products, word_2, factor, first_2, second_2, DTYPE)
    products = _add_products(products, word_3, factor, first_3, second_3, DTYPE)
    farthest = gl.maximum(farthest, gl.max((scale - LOWEST).to(gl.uint32), 0))
    if gl.bfloat16 == DTYPE:
        products *= (scale << 23).to(gl.float32, bitcast=True)
    return products + sums, farthest


@gluon.jit
def _of_each_word(items):
    """A lane's items ``[..., 2, 2]`` that belong to its four words."""
    even, odd = gl.split(items)
    zero, two = gl.split(even)
    one, three = gl.split(odd)
    return zero, one, two, three


@gluon.jit
def _add_products(products, word, factor, first, second, DTYPE: gl.constexpr):
    """``products [4, lanes]`` and those of a word of each row, for float16 times a factor, and two words of x."""
    SUM: gl.constexpr = products.type.layout
    word = gl.convert_layout(word, SUM, assert_trivial=True)
    low, high = _codes(word)
    if gl.float16 == DTYPE:
        low, high = scaled(low, factor, DTYPE, False), scaled(high, factor, DTYPE, False)
    w0, w1 = _pair(low, gl.float16)
    w2, w3 = _pair(high, gl.float16)
    x0, x1 = _pair(gl.convert_layout(first, gl.SliceLayout(0, SUM), assert_trivial=True), DTYPE)
    x2, x3 = _pair(gl.convert_layout(second, gl.SliceLayout(0, SUM), assert_trivial=True), DTYPE)
    products = w0 * x0[None, :] + products
    products = w1 * x1[None, :] + products
    products = w2 * x2[None, :] + products
    return w3 * x3[None, :] + products


@gluon.jit
def _sum_of_lanes(sums):
    """``[4]``, from ``sums [4, lanes]``: every warp adds up all of it, so that all know the results, after a single
    barrier. ``gl.sum`` has two, and five shuffles for every row.
    """
    LANES: gl.constexpr = sums.shape[1]
    shared = gl.allocate_shared_memory(gl.float32, sums.shape, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    shared.store(sums)
    return gl.sum(shared.load(_in_each_warp(LANES)), 1)


@gluon.constexpr_function
def _in_each_warp(lanes):
    """Eight lanes for a row, which take 16 bytes next to each other at a time."""
    registers = [[0, 1], [0, 2], *([0, 32 << i] for i in range((lanes // 32).bit_length() - 1))]
    everywhere = [[0, 0]] * ((lanes // 32).bit_length() - 1)
    return gl.DistributedLinearLayout(registers, [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], everywhere, [], [4, lanes])


@gluon.jit
def _exact_products(x, weight, scale, first, last, K: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr, total):
    """The same for all scales, elements scaled and rounded each: row after row, a word a lane."""
    LANE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    LAYOUT: gl.constexpr = total.type.layout
    for r in range(_ROWS):
        row = gl.minimum(first + r, last).to(gl.int64)
        sums = gl.zeros([32 * WARPS], gl.float32, LANE)
        for start in range(0, K // 4, 32 * WARPS):
            at = start + gl.arange(0, 32 * WARPS, LANE)
            within = at < K // 4
            word = gl.load(weight + row * (K // 4) + at, mask=within, other=0)
            code = gl.load(scale + row * (K // 32) + at // 8, mask=within, other=127).to(gl.int32)
            x0, x1 = _pair(gl.load(x + at * 2, mask=within, other=0), DTYPE)
            x2, x3 = _pair(gl.load(x + at * 2 + 1, mask=within, other=0), DTYPE)
            low, high = _codes(word)
            w0, w1 = _pair(low, gl.float16)
            w2, w3 = _pair(high, gl.float16)
            power = scale_to_float32(code)
            sums += (w0 * power).to(DTYPE).to(gl.float32) * x0 + (w1 * power).to(DTYPE).to(gl.float32) * x1
            sums += (w2 * power).to(DTYPE).to(gl.float32) * x2 + (w3 * power).to(DTYPE).to(gl.float32) * x3
        total = gl.where(gl.arange(0, _ROWS, LAYOUT) == r, gl.sum(sums, 0), total)
    return total


@gluon.jit
def _codes(word):
    """The four elements of each word as float16, two in a word each."""
    return gl.inline_asm_elementwise(_CODES, "=r,=r,r", [word], (gl.int32, gl.int32), True, 1)


@gluon.jit
def _pair(words, DTYPE: gl.constexpr):
    """The two elements in each word, in float32."""
    PAIR: gl.constexpr = _PAIR_BFLOAT16 if gl.bfloat16 == DTYPE else _PAIR_FLOAT16
    return gl.inline_asm_elementwise(PAIR, "=f,=f,r", [words], (gl.float32, gl.float32), True, 1)
