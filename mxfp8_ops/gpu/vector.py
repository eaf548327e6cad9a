"""Linear for one row of x on a weight as it is stored, in Gluon: as fast as the weight's bytes can be read.

A program computes four outputs. Its warps stand along K; a lane takes 16 consecutive elements of each of four rows,
which share its 16 elements of x. All arithmetic is float32, and a sum of 16 products is scaled rather than each
element. That is the reference's answer unless an element would have been rounded or have become infinite in x's dtype,
for which the scale is taken for NaN here, or a sum overflows before it is scaled. Where a result is NaN or infinite,
the program computes its outputs once more, element by element, in a way that takes few registers rather than little
time: with no more than 64 a lane, eight programs of four warps run at once on a multiprocessor.

For chips that convert e4m3 themselves: NVIDIA's from sm_89 on. ``gemv`` does the same in plain Triton, for more rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .counts import divided
from .fragments import scale_to_float32
from .gemv import EXACT_SCALES
from .launch import launch

_ROWS = gl.constexpr(4)  # outputs of a program
_WARP = 32 * 16  # elements of K that a warp takes at a time
_WARPS_AT_ONCE = 32  # on a multiprocessor, by their registers


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, processors: int) -> Tensor:
    """``x [1, K]`` bfloat16 or float16, ``weight [N, K]``, ``scale [N, K/32]``, ``bias [N]``, all contiguous, x and
    weight at multiples of 16 bytes; gives ``[1, N]``.
    """
    n, k = weight.shape
    out = torch.empty((1, n), dtype=x.dtype, device=x.device)
    warps = warps_along(n, k, processors)
    ragged = n % _ROWS.value != 0, k % (warps * _WARP) != 0
    launch(
        mxfp8_linear_vector,
        (divided(n, _ROWS.value),),
        (x.view(torch.int32), weight.view(torch.int32), scale, x if bias is None else bias, out, n, k),
        (warps, *EXACT_SCALES[x.dtype], bias is not None, *ragged),
        num_warps=warps,
    )
    return out


def warps_along(n: int, k: int, processors: int) -> int:
    """As many as K has work for, up to four; fewer if all programs run at once then."""
    most = 4 if k > 2 * _WARP else 2 if k > _WARP else 1
    at_once = [warps for warps in (1, 2, 4) if divided(n, _ROWS.value) * warps <= _WARPS_AT_ONCE * processors]
    return min(most, max(at_once, default=4))


# Four codes of e4m3 in a word, and two pairs of elements of x, to float32.
_CODES = gl.constexpr("""{
.reg .b16 low, high, h0, h1, h2, h3;
.reg .b32 first, second;
mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 first, low;
cvt.rn.f16x2.e4m3x2 second, high;
mov.b32 {h0, h1}, first;
mov.b32 {h2, h3}, second;
cvt.f32.f16 $0, h0;
cvt.f32.f16 $1, h1;
cvt.f32.f16 $2, h2;
cvt.f32.f16 $3, h3;
}""")
_FOUR = gl.constexpr((gl.float32, gl.float32, gl.float32, gl.float32))
_PAIR_BFLOAT16 = gl.constexpr("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }")
_PAIR_FLOAT16 = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")


@gluon.jit(do_not_specialize=["N"])
def mxfp8_linear_vector(
    x,  # pointer [K / 2] int32: two elements in a word
    weight,  # pointer [N, K / 4] int32: four elements in a word
    scale,  # pointer [N, K / 32]
    bias,  # pointer [N], or to anything
    out,  # pointer [N], of x's dtype
    N,
    K,
    WARPS: gl.constexpr,
    LOWEST: gl.constexpr,  # scales under which every finite element is exact in x's dtype
    HIGHEST: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    RAGGED_N: gl.constexpr,  # the last program has fewer than four outputs
    RAGGED_K: gl.constexpr,  # the last step has fewer elements
):
    DTYPE: gl.constexpr = out.dtype.element_ty
    first = gl.program_id(0) * _ROWS
    last = N - 1 if RAGGED_N else first + _ROWS - 1
    total = _products(x, weight, scale, first, last, K, DTYPE, WARPS, LOWEST, HIGHEST, RAGGED_K)
    special = (gl.abs(total) == float("inf")) | (total != total)
    if gl.max(special.to(gl.int32), 0) != 0:
        total = _exact_products(x, weight, scale, first, last, K, DTYPE, WARPS, total)
    LAYOUT: gl.constexpr = total.type.layout
    n = first + gl.arange(0, _ROWS, LAYOUT)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n <= last, other=0).to(gl.float32)
    gl.store(out + n, total.to(DTYPE), mask=n <= last)


@gluon.jit
def _products(
    x,
    weight,
    scale,
    first,
    last,
    K,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
    LOWEST: gl.constexpr,
    HIGHEST: gl.constexpr,
    RAGGED_K: gl.constexpr,
):
    """The products ``[4]`` of x and of rows of the weight, NaN where a scale is not in LOWEST..HIGHEST."""
    WORDS: gl.constexpr = 128 * WARPS  # of a row, in a step
    WORD: gl.constexpr = gl.BlockedLayout([_ROWS, 4], [1, 32], [1, WARPS], [1, 0])
    words, scales, pairs = _places(x, weight, scale, first, last, K, WORDS, WORD)
    GROUP: gl.constexpr = scales.type.layout
    PAIR: gl.constexpr = pairs.type.layout
    sums = gl.zeros([_ROWS, WORDS // 4], gl.float32, GROUP)
    whole = K // (4 * WORDS) * WORDS
    for start in range(0, whole, WORDS):
        word = gl.load(words + start, eviction_policy="evict_first")
        code = gl.load(scales + start // 8)
        sums += _step(word, code, gl.load(pairs + start * 2), DTYPE, LOWEST, HIGHEST)
    if RAGGED_K:
        left = K // 4 - whole
        at = gl.arange(0, WORDS, gl.SliceLayout(0, WORD))
        group = gl.arange(0, WORDS // 4, gl.SliceLayout(0, GROUP))
        both = gl.arange(0, WORDS, gl.SliceLayout(1, PAIR))
        word = gl.load(words + whole, mask=(at < left)[None, :], other=0)
        code = gl.load(scales + whole // 8, mask=(group * 4 < left)[None, :], other=127)
        pair = gl.load(pairs + whole * 2, mask=(both < left)[:, None], other=0)
        sums += _step(word, code, pair, DTYPE, LOWEST, HIGHEST)
    return gl.sum(sums, 1)


@gluon.jit
def _places(x, weight, scale, first, last, K, WORDS: gl.constexpr, WORD: gl.constexpr):
    """Pointers to the words ``[4, WORDS]`` of the first step, to the scales ``[4, WORDS / 4]`` of a lane's four words,
    and to the pairs of x ``[WORDS, 2]`` that go with a word. Rows past the last are that one again.

    K is a multiple of 32. Saying so keeps the loads wide.
    """
    row = gl.minimum(first + gl.arange(0, _ROWS, gl.SliceLayout(1, WORD)), last).to(gl.int64)
    at = gl.arange(0, WORDS, gl.SliceLayout(0, WORD))
    words = weight + row[:, None] * (K // 32 * 8) + at[None, :]
    zeros = gl.full([_ROWS, WORDS], 0, gl.int32, WORD)
    GROUP: gl.constexpr = gl.sum(gl.reshape(zeros, [_ROWS, WORDS // 4, 4]), 2).type.layout
    row = gl.minimum(first + gl.arange(0, _ROWS, gl.SliceLayout(1, GROUP)), last).to(gl.int64)
    group = gl.arange(0, WORDS // 4, gl.SliceLayout(0, GROUP)) // 2
    scales = scale + row[:, None] * (K // 32) + group[None, :]
    PAIR: gl.constexpr = gl.join(at, at).type.layout
    pair = gl.arange(0, WORDS, gl.SliceLayout(1, PAIR))[:, None] * 2
    return words, scales, x + pair + gl.arange(0, 2, gl.SliceLayout(0, PAIR))[None, :]


@gluon.jit
def _step(word, code, pair, DTYPE: gl.constexpr, LOWEST: gl.constexpr, HIGHEST: gl.constexpr):
    """Scaled sums of 16 products, ``[4, WORDS / 4]``."""
    ROW: gl.constexpr = gl.SliceLayout(0, word.type.layout)
    first, second = gl.split(pair)
    x0, x1 = _pair(gl.convert_layout(first, ROW, assert_trivial=True), DTYPE)
    x2, x3 = _pair(gl.convert_layout(second, ROW, assert_trivial=True), DTYPE)
    w0, w1, w2, w3 = gl.inline_asm_elementwise(_CODES, "=f,=f,=f,=f,r", [word], _FOUR, True, 1)
    products = w0 * x0[None, :]
    products = w1 * x1[None, :] + products
    products = w2 * x2[None, :] + products
    products = w3 * x3[None, :] + products
    scale = code.to(gl.int32)
    bits = gl.where((scale >= LOWEST) & (scale <= HIGHEST), scale << 23, 0x7FC00000)
    sums = gl.sum(gl.reshape(products, [word.shape[0], word.shape[1] // 4, 4]), 2)
    return sums * bits.to(gl.float32, bitcast=True)


@gluon.jit
def _exact_products(x, weight, scale, first, last, K, DTYPE: gl.constexpr, WARPS: gl.constexpr, total):
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
            w0, w1, w2, w3 = gl.inline_asm_elementwise(_CODES, "=f,=f,=f,=f,r", [word], _FOUR, True, 1)
            power = scale_to_float32(code)
            sums += (w0 * power).to(DTYPE).to(gl.float32) * x0 + (w1 * power).to(DTYPE).to(gl.float32) * x1
            sums += (w2 * power).to(DTYPE).to(gl.float32) * x2 + (w3 * power).to(DTYPE).to(gl.float32) * x3
        total = gl.where(gl.arange(0, _ROWS, LAYOUT) == r, gl.sum(sums, 0), total)
    return total


@gluon.jit
def _pair(words, DTYPE: gl.constexpr):
    """The two elements of x in each word, in float32."""
    PAIR: gl.constexpr = _PAIR_BFLOAT16 if gl.bfloat16 == DTYPE else _PAIR_FLOAT16
    return gl.inline_asm_elementwise(PAIR, "=f,=f,r", [words], (gl.float32, gl.float32), True, 1)
