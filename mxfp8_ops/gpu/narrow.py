"""Linear on a packed weight for 5 to 32 rows of x, for Hopper, in Gluon: narrow tiles of 32 outputs.

A program computes its outputs over all of K, so that nobody has to add up parts even where there are few of them. Its
warps stand along K: in a turn each takes a block of 128 elements, and their sums are added in the end. TMA brings the
blocks of a turn, and what x has for them, to shared memory, as many turns ahead as there are stages.

Starting a copy takes a whole program a moment, with a barrier for all its warps. So one warp more only loads, and few
copies bring a turn: all elements, all scales, and the rows of x in two boxes, of which the second is moved up where x
has fewer rows, as in ``heights``. The first turn is loaded before that warp has begun. Where a program is a single
warp, many of which run at once, that warp loads for itself, and x in one box.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .fragments import halves, needs_exact, scaled, separate, two_scales
from .heights import moved_up, rows_of_result
from .places import places_along
from .tiles import LOADER_REGISTERS, advance, wait_for_kernel_before
from .versions import barrier, load_box, reinterpret
from .warp_sums import sum_of_warps


@gluon.jit(do_not_specialize=["M"])
def mxfp8_linear_narrow(
    x,  # TMA descriptor, [K / 64, M, 64], boxes of [2 * WARPS, ROWS or half of them, 64]
    elements,  # TMA descriptor, words [block, k6, r6, k5, r5 and lower bits], boxes of [WARPS, 2, 1, 2, 256]
    scales,  # TMA descriptor, [blocks, 132, 32] int32, boxes of [WARPS, 1, 32]
    packed,  # pointer to the packed weight: see mxfp8_ops.packing
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    M,
    N,
    K,  # a multiple of 128
    ROWS: gl.constexpr,  # 8, 16 or 32, at least M
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    FOR_FLOAT16: gl.constexpr,  # the weight was packed for x of float16
    HAS_BIAS: gl.constexpr,
):
    DTYPE: gl.constexpr = out.dtype.element_ty
    BOX: gl.constexpr = x.block_type.shape[1]
    x_stages = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS // BOX * 2 * WARPS, BOX, 64], x.layout)
    element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, WARPS, 2, 1, 2, 256], elements.layout)
    scale_stages = gl.allocate_shared_memory(gl.int32, [STAGES, WARPS, 1, 32], scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if WARPS > 1:
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    else:
        empty = full
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        if WARPS > 1:
            mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    wait_for_kernel_before()
    source = (x, elements, scales, M)
    stages = (x_stages, element_stages, scale_stages, full, empty)
    blocks = K // 128
    result = (packed, bias, out, M, N, K)
    config: gl.constexpr = (FOR_FLOAT16, HAS_BIAS)
    if WARPS == 1:
        for i in gl.static_range(STAGES):
            _fill(source, stages, i, i, blocks)
        _consume(source, stages, result, blocks, config)
    else:
        _fill(source, stages, 0, 0, blocks)
        gl.warp_specialize(
            [(_consume, (source, stages, result, blocks, config)), (_load, (source, stages, blocks))],
            [1],
            [LOADER_REGISTERS],
        )


@gluon.jit
def _load(source, stages, blocks):
    """The one warp that loads: fills a stage as soon as it was left, but the first one, which is on its way."""
    empty = stages[4]
    STAGES: gl.constexpr = stages[0].shape[0]
    WARPS: gl.constexpr = stages[1].shape[1]
    stage = 1
    phase = 1
    for turn in range(1, (blocks + WARPS - 1) // WARPS):
        mbarrier.wait(empty.index(stage), phase)
        _fill(source, stages, turn, stage, blocks)
        stage, phase = advance(stage, phase, 1, STAGES)


@gluon.jit
def _fill(source, stages, turn, stage, blocks):
    """Has TMA fill a stage with a turn, if there is such a turn."""
    x, elements, scales, M = source
    x_stages, element_stages, scale_stages, full, _ = stages
    WARPS: gl.constexpr = element_stages.shape[1]
    HALVES: gl.constexpr = 2 * WARPS  # of blocks, in a turn
    BOXES: gl.constexpr = x_stages.shape[1] // HALVES
    BOX: gl.constexpr = x_stages.shape[2]
    first = turn * WARPS
    there = first < blocks
    tile = gl.program_id(0)  # of 32 rows, four in a block
    block = tile // 4 * blocks + first
    ready = full.index(stage)
    mbarrier.expect(ready, WARPS * (BOXES * BOX * 256 + 32 * 128 + 32 * 4), pred=there)
    load_box(scales, [block, 128 + tile % 4, 0], ready, scale_stages.index(stage), pred=there)
    load_box(elements, [block, 0, tile % 4 // 2, 0, tile % 2 * 256], ready, element_stages.index(stage), pred=there)
    for i in gl.static_range(BOXES):
        row = moved_up(i * BOX, M, BOX)
        load_box(x, [first * 2, row, 0], ready, x_stages.index(stage).slice(i * HALVES, HALVES), pred=there)


@gluon.jit
def _consume(source, stages, result, blocks, config: gl.constexpr):
    """The warps that multiply, and what becomes of their sums."""
    packed, bias, out, M, N, K = result
    FOR_FLOAT16: gl.constexpr = config[0]
    HAS_BIAS: gl.constexpr = config[1]
    BOX: gl.constexpr = stages[0].shape[2]
    if needs_exact(packed, N, K, out.dtype.element_ty):
        total = _products(source, stages, blocks, FOR_FLOAT16, True)
    else:
        total = _products(source, stages, blocks, FOR_FLOAT16, False)
    total = sum_of_warps(total)
    LAYOUT: gl.constexpr = total.type.layout
    n = gl.program_id(0) * 32 + places_along(32, 0, 2, LAYOUT)
    m, wanted = rows_of_result(places_along(total.shape[1], 1, 2, LAYOUT), 0, M, BOX)
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n < N, other=0).to(gl.float32)
    gl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=wanted & (n < N))


@gluon.jit
def _products(source, stages, blocks, FOR_FLOAT16: gl.constexpr, EXACT: gl.constexpr):
    """Every warp's sums ``[WARPS, 32, ROWS]`` of its turns."""
    x_stages, element_stages, scale_stages, full, empty = stages
    STAGES: gl.constexpr = element_stages.shape[0]
    WARPS: gl.constexpr = element_stages.shape[1]
    ROWS: gl.constexpr = x_stages.shape[1] * x_stages.shape[2] // (2 * WARPS)
    DTYPE: gl.constexpr = x_stages.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    total = gl.zeros([WARPS, 32, ROWS], gl.float32, MMA)
    stage = 0
    phase = 0
    turns = (blocks + WARPS - 1) // WARPS
    for turn in range(turns):
        mbarrier.wait(full.index(stage), phase)
        elements, scales = element_stages.index(stage), scale_stages.index(stage)
        weight = _weight(elements, scales, blocks - turn * WARPS, MMA, DTYPE, FOR_FLOAT16, EXACT)
        total = mma_v2(weight, _rows(x_stages.index(stage), WARPS, MMA), total)
        if WARPS > 1:
            mbarrier.arrive(empty.index(stage))
        elif turn + STAGES < turns:
            barrier()
            _fill(source, stages, turn + STAGES, stage, blocks)
        stage, phase = advance(stage, phase, 1, STAGES)
    return total


@gluon.jit
def _rows(stage, WARPS: gl.constexpr, MMA: gl.constexpr):
    """Operand B ``[WARPS, 128, rows]``."""
    BOX: gl.constexpr = stage.shape[1]
    BOXES: gl.constexpr = stage.shape[0] // (2 * WARPS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    PLACES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 5)
    any_rows = gl.full([WARPS, 128, BOXES * BOX], 0, gl.int16, OPERAND)
    ROW: gl.constexpr = gl.reshape(any_rows, [WARPS, 2, 64, BOXES, BOX]).type.layout
    rows = reinterpret(stage, stage.dtype, [BOXES, WARPS, 2, BOX, 64], PLACES).permute((1, 2, 4, 0, 3)).load(ROW)
    return gl.convert_layout(gl.reshape(rows, [WARPS, 128, BOXES * BOX]), OPERAND, assert_trivial=True)


@gluon.jit
def _weight(
    elements,
    scales,
    left,
    MMA: gl.constexpr,
    DTYPE: gl.constexpr,
    FOR_FLOAT16: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Operand A ``[WARPS, 32, 128]``. Blocks that are not there begin the rows below, where x is zero: finite elements
    do no harm, and others are decoded exactly, with zeros in their place.
    """
    WARPS: gl.constexpr = elements.shape[0]
    WORD: gl.constexpr = _any_words(WARPS, MMA).type.layout
    PLACES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [6, 5, 4, 3, 2, 1, 0])
    word = reinterpret(elements, gl.int32, [WARPS, 2, 2, 2, 8, 4, 4], PLACES).load(WORD)
    if EXACT:
        word = gl.where(places_along(WARPS, 0, 7, WORD) < left, word, 0)
    codes_one, codes_other = _scales(scales, left, MMA, EXACT)
    one, other = separate(word, 1, DTYPE, FOR_FLOAT16, EXACT)
    one = scaled(one, _scale(codes_one, word, DTYPE, EXACT), DTYPE, EXACT)
    other = scaled(other, _scale(codes_other, word, DTYPE, EXACT), DTYPE, EXACT)
    one_0, one_1 = halves(one)
    other_0, other_1 = halves(other)
    bits = gl.join(gl.join(one_0, other_0), gl.join(one_1, other_1))  # warp, k6, k5, r4, r210, k21, k43, r3, k0
    tile = gl.reshape(gl.permute(bits, (0, 3, 7, 4, 1, 2, 6, 5, 8)), [WARPS, 32, 128])
    return gl.convert_layout(tile.to(DTYPE, bitcast=True), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _scales(stage, left, MMA: gl.constexpr, EXACT: gl.constexpr):
    """Words of the scales of rows r and r + 8, ``[warp, r4, r210]`` each."""
    WARPS: gl.constexpr = stage.shape[0]
    rows = gl.permute(_any_rows(WARPS, MMA), (1, 2, 0, 3, 4, 7, 5, 6))  # k6, k5, warp, r4, r210, r3, k21, k43
    BOTH: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(6, gl.SliceLayout(7, rows.type.layout))))
    codes = reinterpret(stage, gl.int32, [WARPS, 2, 8, 2], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])).load(BOTH)
    if EXACT:
        codes = gl.where(places_along(WARPS, 0, 4, BOTH) < left, codes, 0)
    return gl.split(codes)


@gluon.jit
def _scale(codes, word, DTYPE: gl.constexpr, EXACT: gl.constexpr):
    """What the elements of each word are multiplied by, from words of the four codes of a row."""
    GROUP: gl.constexpr = gl.SliceLayout(5, gl.SliceLayout(6, word.type.layout))
    zero, one = two_scales(codes, 0, 1, DTYPE, EXACT)
    two, three = two_scales(codes, 2, 3, DTYPE, EXACT)
    groups = gl.join(gl.join(zero, two), gl.join(one, three))
    groups = gl.permute(groups, (0, 3, 4, 1, 2))  # warp, k6, k5, r4, r210
    groups = gl.convert_layout(groups, GROUP, assert_trivial=True)
    groups, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(groups, 5), 6), word)
    return groups


@gluon.jit
def _any_words(WARPS: gl.constexpr, MMA: gl.constexpr):
    """Some words ``[warp, k6, k5, r4, r210, k21, k43]`` in the layout that makes decoded elements lie as operand A
    wants them.
    """
    word, _ = gl.split(_any_rows(WARPS, MMA))
    return word


@gluon.jit
def _any_rows(WARPS: gl.constexpr, MMA: gl.constexpr):
    """The same for what belongs to rows r and r + 8 apart, the last dimension."""
    tile = gl.full([WARPS, 32, 128], 0, gl.int8, gl.DotOperandLayout(0, MMA, 2))
    bits = gl.reshape(tile, [WARPS, 2, 2, 8, 2, 2, 4, 4, 2])  # warp, r4, r3, r210, k6, k5, k43, k21, k0
    rows, _ = gl.split(gl.permute(bits, (0, 4, 5, 1, 3, 7, 6, 2, 8)))
    return rows
