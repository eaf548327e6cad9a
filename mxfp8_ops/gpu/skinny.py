"""Linear on a packed weight for up to some 128 rows of x, for Hopper, in Gluon: as fast as the weight can be read.

One warp of a program only loads: TMA brings stages of 128 elements of K to shared memory, of 64 rows of the weight for
each consumer, and of x. Consumers, of four warps each, decode the weight into registers and multiply it by x, with the
weight as operand A, so that the few rows of x are the narrow side of the matrix instruction. R consumers stand next to
each other along N; S of them share the stages in turn along K and add up their sums through shared memory in the end.

Where tiles do not fill the chip, the last ones are cut along K as well: see ``tiles``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .fragments import needs_exact, weight_fragment
from .tiles import advance, barrier, part_of_tile, place_of_tile, store_part, store_tile

LOADER_REGISTERS = gl.constexpr(24)


@gluon.jit(do_not_specialize=["M", "whole", "parts"])
def kernel(
    x,  # TMA descriptor, [M, K], boxes of [BM, 64]
    elements,  # TMA descriptor, [rows, 32] int32, boxes of [32, 32]
    scales,  # TMA descriptor, the same tensor, boxes of [2, 32]
    packed,  # pointer to that tensor
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    partial,  # pointer [parts of tiles, 64 * R, BM] float32, or to anything
    M,
    N,
    K,
    whole,  # tiles that are computed by one program; the others by `parts` programs each
    parts,
    BM: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    blocks = (K + 127) // 128
    tile, part, first, steps = part_of_tile(blocks, whole, parts)
    row, column = place_of_tile(tile, M, N, BM, 64 * R)
    x_stages = gl.allocate_shared_memory(x.dtype, [STAGES * 2, BM, 64], x.layout)
    element_stages = gl.allocate_shared_memory(gl.int32, [STAGES * R * 2, 32, 32], elements.layout)
    scale_stages = gl.allocate_shared_memory(gl.int32, [STAGES * R, 2, 32], scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=R)
    # What is allocated and never used may be given to others while it is live: only with S > 1 is there a `summed`.
    if S > 1:
        sums = gl.allocate_shared_memory(gl.float32, [(S - 1) * R, 64, BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        summed = gl.allocate_shared_memory(gl.int64, [R, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(R):
            mbarrier.init(summed.index(i), count=S - 1)
    else:
        sums = x_stages
        summed = empty
    fence_async_shared()

    stages = (x_stages, element_stages, scale_stages, full, empty)
    result = (packed, bias, out, partial, sums, summed, M, N, K, row, column, part)
    work = (row, column // 64, first, steps, blocks)
    config: gl.constexpr = (BM, R, S, STAGES, HAS_BIAS)
    if R * S == 1:
        gl.warp_specialize(
            [(_consume, (stages, result, steps, 0, config)), (_load, (x, elements, scales, stages, work, config))],
            [1],
            [LOADER_REGISTERS],
        )
    elif R * S == 2:
        gl.warp_specialize(
            [
                (_consume, (stages, result, steps, 0, config)),
                (_consume, (stages, result, steps, 1, config)),
                (_load, (x, elements, scales, stages, work, config)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (stages, result, steps, 0, config)),
                (_consume, (stages, result, steps, 1, config)),
                (_consume, (stages, result, steps, 2, config)),
                (_consume, (stages, result, steps, 3, config)),
                (_load, (x, elements, scales, stages, work, config)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, LOADER_REGISTERS],
        )


@gluon.jit
def _load(x, elements, scales, stages, work, config: gl.constexpr):
    """The one warp that loads: fills a stage as soon as its consumers have left it."""
    x_stages, element_stages, scale_stages, full, empty = stages
    row, block_row, first, steps, blocks = work
    BM: gl.constexpr = config[0]
    R: gl.constexpr = config[1]
    STAGES: gl.constexpr = config[3]
    stage = 0
    phase = 1
    for step in range(first, first + steps):
        mbarrier.wait(empty.index(stage), phase)
        ready = full.index(stage)
        mbarrier.expect(ready, R * (128 * 64 + 64 * 4) + BM * 128 * 2)
        for r in gl.static_range(R):
            block = ((block_row + r) // 2 * blocks + step) * 132  # of 128 rows: two tiles
            upper = (block_row + r) % 2
            into = stage * R + r
            tma.async_copy_global_to_shared(elements, [block + upper * 32, 0], ready, element_stages.index(into * 2))
            tma.async_copy_global_to_shared(
                elements, [block + 64 + upper * 32, 0], ready, element_stages.index(into * 2 + 1)
            )
            tma.async_copy_global_to_shared(scales, [block + 128 + upper * 2, 0], ready, scale_stages.index(into))
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(x, [row, step * 128 + half * 64], ready, x_stages.index(stage * 2 + half))
        stage, phase = advance(stage, phase, 1, STAGES)


@gluon.jit
def _consume(stages, result, steps, consumer: gl.constexpr, config: gl.constexpr):
    """Four warps: 64 rows of the weight by BM rows of x, over every S-th stage; then the sum goes its way."""
    packed, bias, out, partial, sums, summed, M, N, K, row, column, part = result
    BM: gl.constexpr = config[0]
    R: gl.constexpr = config[1]
    S: gl.constexpr = config[2]
    STAGES: gl.constexpr = config[3]
    HAS_BIAS: gl.constexpr = config[4]
    r: gl.constexpr = consumer % R
    s: gl.constexpr = consumer // R
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    if needs_exact(packed, N, K, out.dtype.element_ty):
        total = _products(stages, steps, r, s, BM, R, S, STAGES, MMA, True)
    else:
        total = _products(stages, steps, r, s, BM, R, S, STAGES, MMA, False)
    if S > 1:
        if s > 0:
            sums.index((s - 1) * R + r).store(total)
            barrier()
            mbarrier.arrive(summed.index(r))
        else:
            mbarrier.wait(summed.index(r), 0)
            for i in gl.static_range(S - 1):
                total += sums.index(i * R + r).load(MMA)
    if s == 0:
        if part >= 0:
            store_part(total, partial + part * (64 * R * BM) + r * (64 * BM))
        else:
            store_tile(total, bias, out, M, N, row, column + r * 64, HAS_BIAS)


@gluon.jit
def _products(
    stages,
    steps,
    r: gl.constexpr,
    s: gl.constexpr,
    BM: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    STAGES: gl.constexpr,
    MMA: gl.constexpr,
    EXACT: gl.constexpr,
):
    x_stages, element_stages, scale_stages, full, empty = stages
    DTYPE: gl.constexpr = x_stages.dtype
    total = gl.zeros([64, BM], gl.float32, MMA)
    stage = s
    phase = 0
    for _ in range(s, steps, S):
        mbarrier.wait(full.index(stage), phase)
        into = stage * R + r
        for half in gl.static_range(2):  # the second half is decoded while the first is multiplied
            weight = weight_fragment(
                element_stages.index(into * 2 + half), scale_stages.index(into), half, 64, MMA, DTYPE, EXACT
            )
            total = warpgroup_mma(weight, x_stages.index(stage * 2 + half).permute((1, 0)), total, is_async=True)
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index(stage))
        stage, phase = advance(stage, phase, S, STAGES)
    return total
