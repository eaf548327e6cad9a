"""Linear for many rows of x, for Hopper, in Gluon: as fast as the matrix units can multiply. The weight is packed or
canonical.

There are as many programs as multiprocessors. One computes a tile of 128 rows of the weight by BM rows of x, and then
the next one (see ``shares``). One warp only loads: TMA brings stages of 64 elements of K to shared memory, those of the
next tile, too, before this one is stored. Eight warps decode a stage into registers while the matrix unit still works
on the stage before. They have nearly all registers of the multiprocessor, 240 for a lane, and nothing else to do:
instructions of theirs slow down the matrix instruction, whose sums are in registers as well.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .canonical import canonical_fragment, scale_places
from .fragments import needs_exact, weight_fragment
from .heights import (
    load_rows,
    mma_layout,
    multiply,
    multiply_at_once,
    piece_of_stage,
    stages_of_rows,
    wait_for_all_but,
    zeros,
)
from .partial_sums import add_stored, say_stored, store_sums
from .shares import FIRST, LAST, first_of_tile, piece_of, pieces_of, when_to_say, work_of
from .tiles import (
    LOADER_REGISTERS,
    advance,
    place_of_tile,
    store_tile,
    wait_for_kernel_before,
)
from .versions import barrier, load_box

_TRANSPOSED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""Of shared memory through which a tile goes when it is stored."""


@gluon.jit(do_not_specialize=["M", "tiles", "whole", "stored"])
def mxfp8_linear_wide(
    x,  # TMA descriptor, [M, K], in boxes of as many rows as a tile begins with, or half of them, by 64
    later_x,  # TMA descriptor, [M, K], boxes of the rows of a tile after its head; or anything
    elements,  # TMA descriptor: PACKED [rows, 32] int32, boxes of [64, 32]; else [N, K / 4] int32, boxes of [128, 16]
    scales,  # PACKED: TMA descriptor, the same tensor, boxes of [4, 32]; else pointer [N, K / 128] int32
    packed,  # PACKED: pointer to that tensor; else to anything
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    partial,  # pointer to what `partial_sums.memory` gives, or to anything
    M,
    N,
    K,
    tiles,
    whole,  # tiles that are computed by one program each; the others are shared by all
    stored,  # what programs write to say that sums are stored
    PACKED: gl.constexpr,  # 1: for x of bfloat16, 2: of float16; 0: not
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    x_stages = stages_of_rows(x, STAGES, 1, BM)
    if PACKED:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 32], elements.layout)
        scale_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 4, 32], scales.layout)
    else:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES, 128, 16], elements.layout)
        scale_stages = element_stages
    scratch = gl.allocate_shared_memory(out.dtype.element_ty, [64, 128], _TRANSPOSED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    all_x = (x, later_x)
    fence_async_shared()
    wait_for_kernel_before()

    stages = (x_stages, element_stages, scale_stages, full, empty)
    blocks = (K + 127) // 128
    problem = (M, N, blocks, tiles, whole)
    result = (bias, out, partial, stored.to(gl.int64), scratch)
    config: gl.constexpr = (PACKED, BM, STAGES, x.block_type.shape[0], HAS_BIAS)
    work = work_of(gl.program_id(0), gl.num_programs(0), tiles, whole, blocks)
    row, column, first, _, _ = _piece(0, work, problem, config)
    if pieces_of(work) > 0:  # at once: it takes a moment until the warp that loads has begun
        _fill(all_x, elements, scales, stages, problem, row, column, first * 2, 0, config)
    gl.warp_specialize(
        [
            (_consume, (stages, packed, scales, work, problem, result, config)),
            (_load, (all_x, elements, scales, stages, work, problem, config)),
        ],
        [1],
        [LOADER_REGISTERS],
    )


@gluon.jit
def _piece(n, work, problem, config: gl.constexpr):
    """The n-th piece of what this program has to do: the first row and column of its tile, from which block of 128
    elements of K on, how many, and whether it is FIRST, WHOLE or LAST. Some piece if there are not as many.
    """
    M, N, blocks, tiles, whole = problem
    tile, first, count, part = piece_of(n, gl.program_id(0), gl.num_programs(0), whole, blocks, work)
    row, column = place_of_tile(gl.minimum(tile, tiles - 1), M, N, config[1], 128)
    return row, column, first, count, part


@gluon.jit
def _load(x, elements, scales, stages, work, problem, config: gl.constexpr):
    """The one warp that loads: fills a stage as soon as it was left, but the first one, which is on its way."""
    empty = stages[4]
    STAGES: gl.constexpr = config[2]
    stage = 1
    phase = 1
    for n in range(pieces_of(work)):
        row, column, first, count, _ = _piece(n, work, problem, config)
        for step in range(first * 2 + gl.where(n == 0, 1, 0), (first + count) * 2):
            mbarrier.wait(empty.index(stage), phase)
            _fill(x, elements, scales, stages, problem, row, column, step, stage, config)
            stage, phase = advance(stage, phase, 1, STAGES)


@gluon.jit
def _fill(x, elements, scales, stages, problem, row, column, step, stage, config: gl.constexpr):
    """Has TMA fill a stage with 64 elements of K."""
    x_stages, element_stages, scale_stages, full, _ = stages
    M, _, blocks, _, _ = problem
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    ready = full.index(stage)
    mbarrier.expect(ready, 128 * 64 + 128 * 4 * (PACKED > 0) + BM * 64 * 2)
    if PACKED:
        block = (column // 128 * blocks + step // 2) * 132
        at = [block + step % 2 * 64, 0]
        load_box(scales, [block + 128, 0], ready, scale_stages.index(stage))
    else:
        at = [column, step * 16]
    load_box(elements, at, ready, element_stages.index(stage))
    load_rows(x, row, M, step * 64, ready, piece_of_stage(x_stages, stage, 0, 1))


@gluon.jit
def _consume(stages, packed, scales, work, problem, result, config: gl.constexpr):
    """The warps that multiply."""
    _, N, blocks, _, _ = problem
    if config[0] and needs_exact(packed, N, blocks * 128, stages[0][0].dtype):
        _exact(stages, work, problem, result, config)
    else:
        _fast(stages, scales, work, problem, result, config)


@gluon.jit
def _finish(n, sums, work, problem, result, config: gl.constexpr):
    """Stores what the n-th piece has come to: sums for others, or its tile of the result."""
    M, N, blocks, tiles, whole = problem
    bias, out, partial, stored, scratch = result
    row, column, _, _, part = _piece(n, work, problem, config)
    BM: gl.constexpr = config[1]
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    if part == FIRST:
        store_sums(sums, partial, program)
        barrier()
    if n == when_to_say(work):
        say_stored(partial, stored, program, programs, 128 * BM)
    if part != FIRST:
        if part == LAST:
            others = first_of_tile(program, programs, tiles - whole, blocks, work)
            sums = add_stored(sums, partial, stored, others, program - others, programs)
        store_tile(sums, bias, out, M, N, row, column, (scratch, scratch), config[3], config[4])


@gluon.jit
def _decode(stages, scales, stage, HALF: gl.constexpr, config: gl.constexpr):
    """A stage's elements, the half (0 or 1) of a block, as an operand. ``scales`` are those of a canonical weight."""
    x_stages, element_stages, scale_stages, _, _ = stages
    PACKED: gl.constexpr = config[0]
    MMA: gl.constexpr = mma_layout(config[1], 8)
    DTYPE: gl.constexpr = x_stages[0].dtype
    elements = element_stages.index(stage)
    if PACKED:
        return weight_fragment(elements, scale_stages.index(stage), HALF, 128, MMA, DTYPE, PACKED == 2, False)
    else:
        return canonical_fragment(elements, scales, HALF, 128, MMA, DTYPE)


@gluon.jit
def _fast(stages, scales, work, problem, result, config: gl.constexpr):
    """All pieces, of blocks of 128 elements, two steps each. A step is decoded one ahead, of whichever piece it is, and
    so are scales of a canonical weight loaded from their ``places``, a block ahead.
    """
    x_stages, _, _, full, empty = stages
    PACKED: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[2]
    pieces = pieces_of(work)
    places = 0
    codes = 0
    if not PACKED:
        places = _scale_places(0, scales, work, problem, config)
        codes = gl.load(places)
    stage = 0
    phase = 0
    before = 0
    mbarrier.wait(full.index(0), 0, pred=pieces > 0)  # a short share may be empty
    weight = _decode(stages, codes, 0, 0, config)
    for n in range(pieces):
        places_then = places
        if not PACKED:
            places_then = _scale_places(n + 1, scales, work, problem, config)
        blocks = _piece(n, work, problem, config)[3]
        sums = zeros(128, config[1], 8)
        for block in range(blocks):
            sums = multiply(weight, piece_of_stage(x_stages, stage, 0, 1), sums)
            sums = wait_for_all_but(1, sums)
            mbarrier.arrive(empty.index(before), pred=block > 0)
            next_codes = codes
            if not PACKED:
                places = gl.where(block == blocks - 1, places_then, places + 1)
                next_codes = gl.load(places)
            before = stage
            stage, phase = advance(stage, phase, 1, STAGES)
            mbarrier.wait(full.index(stage), phase)
            weight = _decode(stages, codes, stage, 1, config)
            sums = multiply(weight, piece_of_stage(x_stages, stage, 0, 1), sums)
            sums = wait_for_all_but(1, sums)
            mbarrier.arrive(empty.index(before))
            before = stage
            stage, phase = advance(stage, phase, 1, STAGES)
            codes = next_codes
            mbarrier.wait(full.index(stage), phase, pred=(block < blocks - 1) | (n < pieces - 1))
            weight = _decode(stages, codes, stage, 0, config)
        sums = wait_for_all_but(0, sums)
        mbarrier.arrive(empty.index(before))
        _finish(n, sums, work, problem, result, config)


@gluon.jit
def _scale_places(n, scales, work, problem, config: gl.constexpr):
    """Where the n-th piece's scales begin, of a canonical weight."""
    _, N, blocks, _, _ = problem
    _, column, first, _, _ = _piece(n, work, problem, config)
    return scale_places(scales, column, N, blocks * 128, 128, mma_layout(config[1], 8)) + first


@gluon.jit
def _exact(stages, work, problem, result, config: gl.constexpr):
    """The same with exact decoding, for packed weights with special codes: rare, so it may take longer. One step after
    the other, on the older matrix instruction: the compiler serializes all of the newer one where two loops use it.
    """
    x_stages, element_stages, scale_stages, full, empty = stages
    DTYPE: gl.constexpr = x_stages[0].dtype
    PACKED: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[2]
    MMA: gl.constexpr = mma_layout(config[1], 8)
    stage = 0
    phase = 0
    for n in range(pieces_of(work)):
        sums = zeros(128, config[1], 8)
        for _ in range(_piece(n, work, problem, config)[3]):
            for half in gl.static_range(2):
                mbarrier.wait(full.index(stage), phase)
                weight = weight_fragment(
                    element_stages.index(stage), scale_stages.index(stage), half, 128, MMA, DTYPE, PACKED == 2, True
                )
                sums = multiply_at_once(weight, piece_of_stage(x_stages, stage, 0, 1), sums)
                mbarrier.arrive(empty.index(stage))
                stage, phase = advance(stage, phase, 1, STAGES)
        _finish(n, sums, work, problem, result, config)
