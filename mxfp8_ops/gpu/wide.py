"""Linear on a packed weight for many rows of x, for Hopper, in Gluon: as fast as the matrix units can multiply.

Eight warps compute a tile of 128 rows of the weight by BM rows of x. They decode a stage of 64 elements of K into
registers while the matrix unit still works on the stage before; TMA fills the stages ahead of them. There is no warp
that only loads: three warpgroups would have to share the registers that two need here.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .fragments import needs_exact, weight_fragment
from .tiles import advance, barrier, part_of_tile, place_of_tile, store_part, store_tile


@gluon.jit(do_not_specialize=["M", "whole", "parts"])
def kernel(
    x,  # TMA descriptor, [M, K], boxes of [BM, 64]
    elements,  # TMA descriptor, [rows, 32] int32, boxes of [64, 32]
    scales,  # TMA descriptor, the same tensor, boxes of [4, 32]
    packed,  # pointer to that tensor
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    partial,  # pointer [parts of tiles, 128, BM] float32, or to anything
    M,
    N,
    K,
    whole,  # tiles that are computed by one program; the others by `parts` programs each
    parts,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    blocks = (K + 127) // 128
    tile, part, first, steps = part_of_tile(blocks, whole, parts)
    row, column = place_of_tile(tile, M, N, BM, 128)
    x_stages = gl.allocate_shared_memory(x.dtype, [STAGES, BM, 64], x.layout)
    element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 32], elements.layout)
    scale_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 4, 32], scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()

    sources = (x, elements, scales, row, (column // 128 * blocks + first) * 132, first * 2, steps * 2)
    stages = (x_stages, element_stages, scale_stages, full)
    for i in gl.static_range(STAGES - 1):
        _load(sources, stages, i, i, BM)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
    if needs_exact(packed, N, K, x.dtype):
        total = _exact_products(sources, stages, steps, BM, STAGES, MMA)
    else:
        total = _products(sources, stages, steps, BM, STAGES, MMA)
    barrier()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))  # storing may take these bytes as scratch memory
    if part >= 0:
        store_part(total, partial + part.to(gl.int64) * (128 * BM))
    else:
        store_tile(total, bias, out, M, N, row, column, HAS_BIAS)


@gluon.jit
def _load(sources, stages, step, stage, BM: gl.constexpr):
    """Has TMA fill a stage with a step of 64 elements of K, if there are as many."""
    x, elements, scales, row, block, first, steps = sources
    x_stages, element_stages, scale_stages, full = stages
    ready = full.index(stage)
    within = step < steps
    mbarrier.expect(ready, 128 * 64 + 128 * 4 + BM * 64 * 2, pred=within)
    at = block + step // 2 * 132
    tma.async_copy_global_to_shared(elements, [at + step % 2 * 64, 0], ready, element_stages.index(stage), pred=within)
    tma.async_copy_global_to_shared(scales, [at + 128, 0], ready, scale_stages.index(stage), pred=within)
    tma.async_copy_global_to_shared(x, [row, (first + step) * 64], ready, x_stages.index(stage), pred=within)


@gluon.jit
def _products(sources, stages, blocks, BM: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr):
    """The tile's sum over ``blocks`` blocks of 128 elements, two steps each. A step is decoded one ahead."""
    x_stages, element_stages, scale_stages, full = stages
    DTYPE: gl.constexpr = x_stages.dtype
    total = gl.zeros([128, BM], gl.float32, MMA)
    mbarrier.wait(full.index(0), 0)
    weight = weight_fragment(element_stages.index(0), scale_stages.index(0), 0, 128, MMA, DTYPE, False)
    stage = 0
    phase = 0
    left = STAGES - 1  # the stage that the last step left
    for step in range(0, blocks * 2, 2):
        total = warpgroup_mma(weight, x_stages.index(stage).permute((1, 0)), total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        barrier()
        _load(sources, stages, step + STAGES - 1, left, BM)
        left = stage
        stage, phase = advance(stage, phase, 1, STAGES)
        mbarrier.wait(full.index(stage), phase)
        weight = weight_fragment(element_stages.index(stage), scale_stages.index(stage), 1, 128, MMA, DTYPE, False)
        total = warpgroup_mma(weight, x_stages.index(stage).permute((1, 0)), total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        barrier()
        _load(sources, stages, step + STAGES, left, BM)
        left = stage
        stage, phase = advance(stage, phase, 1, STAGES)
        mbarrier.wait(full.index(stage), phase, pred=step + 2 < blocks * 2)
        weight = weight_fragment(element_stages.index(stage), scale_stages.index(stage), 0, 128, MMA, DTYPE, False)
    return warpgroup_mma_wait(0, deps=[total])


@gluon.jit
def _exact_products(sources, stages, blocks, BM: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr):
    """The same with exact decoding, for weights with special codes: rare, so it may take longer. One step after the
    other, on the older matrix instruction: the compiler serializes all of the newer one where two loops use it.
    """
    x_stages, element_stages, scale_stages, full = stages
    DTYPE: gl.constexpr = x_stages.dtype
    OLDER: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [8, 1], [16, 8])
    total = gl.zeros([128, BM], gl.float32, OLDER)
    stage = 0
    phase = 0
    _load(sources, stages, STAGES - 1, STAGES - 1, BM)
    for block in range(blocks):
        for half in gl.static_range(2):
            mbarrier.wait(full.index(stage), phase)
            weight = weight_fragment(
                element_stages.index(stage), scale_stages.index(stage), half, 128, MMA, DTYPE, True
            )
            weight = gl.convert_layout(weight, gl.DotOperandLayout(0, OLDER, 2), assert_trivial=True)
            rows = x_stages.index(stage).permute((1, 0)).load(gl.DotOperandLayout(1, OLDER, 2))
            total = mma_v2(weight, rows, total)
            barrier()
            _load(sources, stages, block * 2 + half + STAGES, stage, BM)
            stage, phase = advance(stage, phase, 1, STAGES)
    return gl.convert_layout(total, MMA, assert_trivial=True)
