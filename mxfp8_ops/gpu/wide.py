"""Linear for many rows of x, for Hopper, in Gluon: as fast as the matrix units can multiply. The weight is packed or
canonical.

There are as many programs as multiprocessors. The eight warps of one compute a tile of 128 rows of the weight by BM
rows of x, and then the next one (see ``shares``). They decode a stage of 64 elements of K into registers while the
matrix unit still works on the stage before; TMA fills the stages ahead of them, those of the next tile, too, before
this one is stored. There is no warp that only loads: three warpgroups would have to share the registers that two need
here.
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

from .ahead import cursor, load, next_block, next_block_or, piece
from .canonical import canonical_fragment, scale_places
from .fragments import needs_exact, weight_fragment
from .shares import FIRST, LAST, add_sums, pieces_of, say_stored, store_sums, when_to_say, work_of
from .tiles import advance, store_quarters, wait_for_kernel_before
from .versions import barrier


@gluon.jit(do_not_specialize=["M", "tiles", "whole", "stored"])
def mxfp8_linear_wide(
    x,  # TMA descriptor, [M, K], boxes of [BOX, 64]
    elements,  # TMA descriptor: PACKED [rows, 32] int32, boxes of [64, 32]; else [N, K / 4] int32, boxes of [128, 16]
    scales,  # PACKED: TMA descriptor, the same tensor, boxes of [4, 32]; else pointer [N, K / 128] int32
    packed,  # PACKED: pointer to that tensor; else to anything
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    sums,  # pointer to what `shares.memory` gives, or to anything
    M,
    N,
    K,
    tiles,
    whole,  # tiles that are computed by one program each; the others are shared by all
    stored,  # what programs write to say that sums are stored
    PACKED: gl.constexpr,  # 1: for x of bfloat16, 2: of float16; 0: not
    BM: gl.constexpr,
    STAGES: gl.constexpr,  # an odd number: those ahead are whole blocks
    BOX: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    x_stages = gl.allocate_shared_memory(x.dtype, [STAGES, BM, 64], x.layout)
    if PACKED:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 32], elements.layout)
        scale_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 4, 32], scales.layout)
    else:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 128, 16], elements.layout)
        scale_stages = element_stages
    scratch = gl.allocate_shared_memory(out.dtype.element_ty, [BM // 4, 128], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    wait_for_kernel_before()

    blocks = (K + 127) // 128
    work = work_of(gl.program_id(0), gl.num_programs(0), tiles, whole, blocks)
    sources = (x, elements, scales)
    stages = (x_stages, element_stages, scale_stages, full)
    problem = (M, N, blocks, tiles, whole, work, pieces_of(work))
    result = (bias, out, sums, stored.to(gl.int64), scratch)
    config: gl.constexpr = (PACKED, BM, STAGES, BOX, HAS_BIAS)
    ahead = cursor(0, problem, config)
    for i in gl.static_range(0, STAGES - 1, 2):
        load(sources, stages, problem, ahead, i, 0, config)
        load(sources, stages, problem, ahead, i + 1, 1, config)
        ahead = next_block(ahead, problem, config)
    if PACKED and needs_exact(packed, N, K, x.dtype):
        _exact(sources, stages, problem, result, ahead, config)
    else:
        _fast(sources, stages, problem, result, ahead, config)


@gluon.constexpr_function
def _mma(rows):
    return gl.NVMMADistributedLayout([3, 0], [8, 1], [16, rows, 16])


@gluon.jit
def _finish(n, total, problem, result, config: gl.constexpr):
    """Stores what the n-th piece has come to: sums for others, or its tile of the result."""
    M, N, blocks, tiles, whole, work, _ = problem
    bias, out, sums, stored, scratch = result
    row, column, _, _, part = piece(n, problem, config[1])
    BM: gl.constexpr = config[1]
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    if part == FIRST:
        store_sums(total, sums, program)
        barrier()
    if n == when_to_say(work):
        say_stored(sums, stored, program, programs, 128 * BM)
    if part != FIRST:
        if part == LAST:
            total = add_sums(total, sums, stored, program, programs, tiles - whole, blocks, work)
        store_quarters(total, bias, out, M, N, row, column, scratch, config[3], config[4])


@gluon.jit
def _decode(stages, scales, stage, HALF: gl.constexpr, config: gl.constexpr):
    """A stage's elements, the half (0 or 1) of a block, as an operand. ``scales`` are those of a canonical weight."""
    x_stages, element_stages, scale_stages, _ = stages
    PACKED: gl.constexpr = config[0]
    MMA: gl.constexpr = _mma(config[1])
    if PACKED:
        return weight_fragment(
            element_stages.index(stage), scale_stages.index(stage), HALF, 128, MMA, x_stages.dtype, PACKED == 2, False
        )
    else:
        return canonical_fragment(element_stages.index(stage), scales, HALF, 128, MMA, x_stages.dtype)


@gluon.jit
def _fast(sources, stages, problem, result, ahead, config: gl.constexpr):
    """All pieces, of blocks of 128 elements, two steps each. A step is decoded one ahead, of whichever piece it is.
    Scales of a canonical weight are loaded a block ahead, from ``places``: right after TMA was told to load, which
    waits for all loads before. Where a piece lies is computed again in its end: kept meanwhile, it would cost registers
    that the loop needs.
    """
    x_stages = stages[0]
    full = stages[3]
    PACKED: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[2]
    MMA: gl.constexpr = _mma(config[1])
    places = 0
    scales = 0
    if not PACKED:
        places = _scale_places(0, sources, problem, MMA)
        scales = gl.load(places)
    stage = 0
    phase = 0
    free = STAGES - 1
    pieces = problem[6]
    mbarrier.wait(full.index(0), 0)
    weight = _decode(stages, scales, 0, 0, config)
    for n in range(pieces):
        then = cursor(ahead[0] + 1, problem, config)
        places_then = places
        if not PACKED:
            places_then = _scale_places(n + 1, sources, problem, MMA)
        blocks = piece(n, problem, config[1])[3]
        total = gl.zeros([128, config[1]], gl.float32, MMA)
        for block in range(blocks):
            total = warpgroup_mma(weight, x_stages.index(stage).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            barrier()
            load(sources, stages, problem, ahead, free, 0, config)
            next_scales = scales
            if not PACKED:
                places = gl.where(block == blocks - 1, places_then, places + 1)
                next_scales = gl.load(places)
            free = stage
            stage, phase = advance(stage, phase, 1, STAGES)
            mbarrier.wait(full.index(stage), phase)
            weight = _decode(stages, scales, stage, 1, config)
            total = warpgroup_mma(weight, x_stages.index(stage).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            barrier()
            load(sources, stages, problem, ahead, free, 1, config)
            ahead = next_block_or(ahead, then, PACKED)
            free = stage
            stage, phase = advance(stage, phase, 1, STAGES)
            scales = next_scales
            mbarrier.wait(full.index(stage), phase, pred=(block < blocks - 1) | (n < pieces - 1))
            weight = _decode(stages, scales, stage, 0, config)
        total = warpgroup_mma_wait(0, deps=[total])
        _finish(n, total, problem, result, config)


@gluon.jit
def _scale_places(n, sources, problem, MMA: gl.constexpr):
    """Where the n-th piece's scales begin, of a canonical weight."""
    _, N, blocks, _, _, _, _ = problem
    _, column, first, _, _ = piece(n, problem, MMA.instr_shape[1])
    return scale_places(sources[2], column, N, blocks * 128, 128, MMA) + first


@gluon.jit
def _exact(sources, stages, problem, result, ahead, config: gl.constexpr):
    """The same with exact decoding, for packed weights with special codes: rare, so it may take longer. One step after
    the other, on the older matrix instruction: the compiler serializes all of the newer one where two loops use it.
    """
    x_stages, element_stages, scale_stages, full = stages
    DTYPE: gl.constexpr = x_stages.dtype
    PACKED: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[2]
    MMA: gl.constexpr = _mma(config[1])
    OLDER: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [8, 1], [16, 8])
    stage = 0
    phase = 0
    load(sources, stages, problem, ahead, STAGES - 1, 0, config)
    for n in range(problem[6]):
        total = gl.zeros([128, config[1]], gl.float32, OLDER)
        for _ in range(piece(n, problem, config[1])[3]):
            for half in gl.static_range(2):
                mbarrier.wait(full.index(stage), phase)
                weight = weight_fragment(
                    element_stages.index(stage), scale_stages.index(stage), half, 128, MMA, DTYPE, PACKED == 2, True
                )
                weight = gl.convert_layout(weight, gl.DotOperandLayout(0, OLDER, 2), assert_trivial=True)
                rows = x_stages.index(stage).permute((1, 0)).load(gl.DotOperandLayout(1, OLDER, 2))
                total = mma_v2(weight, rows, total)
                barrier()
                load(sources, stages, problem, ahead, stage, 1 - half, config)
                if half == 0:
                    ahead = next_block(ahead, problem, config)
                stage, phase = advance(stage, phase, 1, STAGES)
        total = gl.convert_layout(total, MMA, assert_trivial=True)
        _finish(n, total, problem, result, config)
