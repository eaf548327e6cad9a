"""Linear for many rows of x, for Hopper, in Gluon: as fast as the matrix units can multiply. The weight is packed or
canonical.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .canonical import canonical_fragment, scale_places
from .fragments import needs_exact, weight_fragment
from .tiles import advance, load_rows, part_of_tile, place_of_tile, store_part, store_tile, wait_for_kernel_before
from .versions import barrier, load_box


@gluon.jit(do_not_specialize=["M", "whole", "parts"])
def mxfp8_linear_wide(
    x,  # TMA descriptor, [M, K], boxes of [BOX, 64]
    elements,  # TMA descriptor: PACKED [rows, 32] int32, boxes of [64, 32]; else [N, K / 4] int32, boxes of [128, 16]
    scales,  # PACKED: TMA descriptor, the same tensor, boxes of [4, 32]; else pointer [N, K / 128] int32
    packed,  # PACKED: pointer to that tensor; else to anything
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    partial,  # pointer [parts of tiles, 128, BM] float32, or to anything
    M,
    N,
    K,
    whole,  # tiles that are computed by one program; the others by `parts` programs each
    parts,
    PACKED: gl.constexpr,  # 1: for x of bfloat16, 2: of float16; 0: not
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    BOX: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    blocks = (K + 127) // 128
    tile, part, first, steps = part_of_tile(blocks, whole, parts)
    row, column = place_of_tile(tile, M, N, BM, 128)
    x_stages = gl.allocate_shared_memory(x.dtype, [STAGES, BM, 64], x.layout)
    if PACKED:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 32], elements.layout)
        scale_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 4, 32], scales.layout)
    else:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 128, 16], elements.layout)
        scale_stages = element_stages
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    wait_for_kernel_before()

    sources = (x, elements, scales, M, row, column, blocks, first, steps)
    stages = (x_stages, element_stages, scale_stages, full)
    config: gl.constexpr = (PACKED, BM, STAGES, BOX)
    for i in gl.static_range(STAGES - 1):
        _load(sources, stages, i, i, config)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
    if not PACKED:
        places = scale_places(scales, column, N, K, 128, MMA) + first
        total = _products(sources, stages, places, MMA, config)
    elif needs_exact(packed, N, K, x.dtype):
        total = _exact_products(sources, stages, MMA, config)
    else:
        total = _products(sources, stages, scales, MMA, config)
    barrier()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))  # storing may take these bytes as scratch memory
    if part >= 0:
        store_part(total, partial + part.to(gl.int64) * (128 * BM))
    else:
        store_tile(total, bias, out, M, N, row, column, BOX, HAS_BIAS)


@gluon.jit
def _load(sources, stages, step, stage, config: gl.constexpr):
    """Has TMA fill a stage with a step of 64 elements of K, if there are as many."""
    x, elements, scales, M, row, column, blocks, first, steps = sources
    x_stages, element_stages, scale_stages, full = stages
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    BOX: gl.constexpr = config[3]
    ready = full.index(stage)
    within = step < steps * 2
    mbarrier.expect(ready, 128 * 64 + 128 * 4 * (PACKED > 0) + BM * 64 * 2, pred=within)
    if PACKED:
        block = (column // 128 * blocks + first + step // 2) * 132
        at = [block + step % 2 * 64, 0]
        load_box(scales, [block + 128, 0], ready, scale_stages.index(stage), pred=within)
    else:
        at = [column, (first * 2 + step) * 16]
    load_box(elements, at, ready, element_stages.index(stage), pred=within)
    load_rows(x, row, M, (first * 2 + step) * 64, ready, x_stages.index(stage), BOX, within)


@gluon.jit
def _decode(stages, scales, stage, HALF: gl.constexpr, PACKED: gl.constexpr, MMA: gl.constexpr):
    """A stage's elements, the half (0 or 1) of a block, as an operand. ``scales`` are those of a canonical weight."""
    x_stages, element_stages, scale_stages, _ = stages
    if PACKED:
        return weight_fragment(
            element_stages.index(stage), scale_stages.index(stage), HALF, 128, MMA, x_stages.dtype, PACKED == 2, False
        )
    else:
        return canonical_fragment(element_stages.index(stage), scales, HALF, 128, MMA, x_stages.dtype)


@gluon.jit
def _products(sources, stages, places, MMA: gl.constexpr, config: gl.constexpr):
    """The tile's sum over blocks of 128 elements, two steps each. A step is decoded one ahead; scales of a canonical
    weight are loaded from their ``places`` a block ahead.
    """
    x_stages, _, _, full = stages
    _, _, _, _, _, _, _, _, steps = sources
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    STAGES: gl.constexpr = config[2]
    total = gl.zeros([128, BM], gl.float32, MMA)
    scales = 0
    if not PACKED:
        scales = gl.load(places)
    mbarrier.wait(full.index(0), 0)
    weight = _decode(stages, scales, 0, 0, PACKED, MMA)
    stage = 0
    phase = 0
    left = STAGES - 1  # the stage that the last step left
    for step in range(0, steps * 2, 2):
        total = warpgroup_mma(weight, x_stages.index(stage).permute((1, 0)), total, is_async=True)
        if not PACKED:
            next_scales = gl.load(places + gl.minimum(step // 2 + 1, steps - 1))
        total = warpgroup_mma_wait(1, deps=[total])
        barrier()
        _load(sources, stages, step + STAGES - 1, left, config)
        left = stage
        stage, phase = advance(stage, phase, 1, STAGES)
        mbarrier.wait(full.index(stage), phase)
        weight = _decode(stages, scales, stage, 1, PACKED, MMA)
        total = warpgroup_mma(weight, x_stages.index(stage).permute((1, 0)), total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        barrier()
        _load(sources, stages, step + STAGES, left, config)
        left = stage
        stage, phase = advance(stage, phase, 1, STAGES)
        mbarrier.wait(full.index(stage), phase, pred=step + 2 < steps * 2)
        if not PACKED:
            scales = next_scales
        weight = _decode(stages, scales, stage, 0, PACKED, MMA)
    return warpgroup_mma_wait(0, deps=[total])


@gluon.jit
def _exact_products(sources, stages, MMA: gl.constexpr, config: gl.constexpr):
    """The same with exact decoding, for packed weights with special codes: rare, so it may take longer. One step after
    the other, on the older matrix instruction: the compiler serializes all of the newer one where two loops use it.
    """
    x_stages, element_stages, scale_stages, full = stages
    DTYPE: gl.constexpr = x_stages.dtype
    _, _, _, _, _, _, _, _, steps = sources
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    STAGES: gl.constexpr = config[2]
    OLDER: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [8, 1], [16, 8])
    total = gl.zeros([128, BM], gl.float32, OLDER)
    stage = 0
    phase = 0
    _load(sources, stages, STAGES - 1, STAGES - 1, config)
    for block in range(steps):
        for half in gl.static_range(2):
            mbarrier.wait(full.index(stage), phase)
            weight = weight_fragment(
                element_stages.index(stage), scale_stages.index(stage), half, 128, MMA, DTYPE, PACKED == 2, True
            )
            weight = gl.convert_layout(weight, gl.DotOperandLayout(0, OLDER, 2), assert_trivial=True)
            rows = x_stages.index(stage).permute((1, 0)).load(gl.DotOperandLayout(1, OLDER, 2))
            total = mma_v2(weight, rows, total)
            barrier()
            _load(sources, stages, block * 2 + half + STAGES, stage, config)
            stage, phase = advance(stage, phase, 1, STAGES)
    return gl.convert_layout(total, MMA, assert_trivial=True)
