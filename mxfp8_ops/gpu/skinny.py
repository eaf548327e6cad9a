"""Linear for up to some 200 rows of x, for Hopper, in Gluon: as fast as the weight can be read, packed or canonical.

One warp of a program only loads: TMA brings stages of 128 elements of K to shared memory, of 64 rows of the weight for
each consumer, and of x. Consumers, of four warps each, decode the weight into registers and multiply it by x, with the
weight as operand A, so that the few rows of x are the narrow side of the matrix instruction. R consumers stand next to
each other along N; S of them share the stages in turn along K and add up their sums through shared memory in the end.
What comes before the first load and after the last product counts as much as the loop does for small weights: the first
stage is loaded before the warp that loads has begun.

Where tiles do not fill the chip, they are cut along K as well: see ``tiles``.
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
    piece_of_stage,
    stages_of_rows,
    wait_for_all_but,
    zeros,
)
from .partial_sums import STORING, add_stored, as_before, in_order_of_registers, say_stored, store_sums
from .tiles import (
    LOADER_REGISTERS,
    advance,
    part_of_tile,
    place_of_tile,
    store_tile,
    wait_for_kernel_before,
)
from .versions import barrier, load_box, reinterpret

_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit(do_not_specialize=["M", "parts", "stored"])
def mxfp8_linear_skinny(
    x,  # TMA descriptor, [M, K], in boxes of as many rows as a tile begins with, or half of them, by 64
    later_x,  # TMA descriptor, [M, K], boxes of the rows of a tile after its head; or anything
    elements,  # TMA descriptor: PACKED [rows, 32] int32, boxes of [R * 32, 32]; else [N, K / 4], boxes of [R * 64, 16]
    scales,  # PACKED: TMA descriptor, the same tensor, boxes of [R * 2, 32]; else pointer [N, K / 128] int32
    packed,  # PACKED: pointer to that tensor; else to anything
    bias,  # pointer [N], or to anything
    out,  # pointer [M, N]
    partial,  # pointer to what `partial_sums.memory` gives, or to anything
    M,
    N,
    K,
    parts,  # programs that compute a tile
    stored,  # what programs write to say that sums are stored
    PACKED: gl.constexpr,  # 1: for x of bfloat16, 2: of float16; 0: not
    BM: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    gl.static_assert(R <= 2)  # what is packed together
    gl.static_assert(STAGES % S == 0)  # a stage is always the same consumers': they count how often it was filled
    gl.static_assert(STAGES >= S * R)  # each of them gets the memory of one in the end
    blocks = (K + 127) // 128
    tile, part, first, steps = part_of_tile(blocks, parts, last_part_longer(PACKED, BM, STAGES))
    row, column = place_of_tile(tile, M, N, BM, 64 * R)
    x_stages = stages_of_rows(x, STAGES, 2, BM)
    if PACKED:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES * 2, R * 32, 32], elements.layout)
        scale_stages = gl.allocate_shared_memory(gl.int32, [STAGES, R * 2, 32], scales.layout)
    else:
        element_stages = gl.allocate_shared_memory(gl.int32, [STAGES * 2, R * 64, 16], elements.layout)
        scale_stages = element_stages
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=R)
    # What is allocated and never used may be given to others while it is live: only with S > 1 is there a `summed`.
    if S > 1:
        summed = gl.allocate_shared_memory(gl.int64, [R, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(R):
            mbarrier.init(summed.index(i), count=S - 1)
    else:
        summed = empty
    all_x = (x, later_x)
    fence_async_shared()
    wait_for_kernel_before()

    stages = (x_stages, element_stages, scale_stages, full, empty)
    source = (packed, scales, first, N, K)
    result = (bias, out, partial, stored.to(gl.int64), summed, M, N, row, column, part, parts)
    work = (M, row, column // 64, first, steps, blocks)
    config: gl.constexpr = (PACKED, BM, R, S, STAGES, x.block_type.shape[0], HAS_BIAS)
    if steps > 0:  # at once: it takes a moment until the warp that loads has begun
        _fill(all_x, elements, scales, stages, work, first, 0, config)
    if R * S == 1:
        gl.warp_specialize(
            [
                (_consume, (stages, source, result, steps, 0, config)),
                (_load, (all_x, elements, scales, stages, work, config)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
    elif R * S == 2:
        gl.warp_specialize(
            [
                (_consume, (stages, source, result, steps, 0, config)),
                (_consume, (stages, source, result, steps, 1, config)),
                (_load, (all_x, elements, scales, stages, work, config)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (stages, source, result, steps, 0, config)),
                (_consume, (stages, source, result, steps, 1, config)),
                (_consume, (stages, source, result, steps, 2, config)),
                (_consume, (stages, source, result, steps, 3, config)),
                (_load, (all_x, elements, scales, stages, work, config)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, LOADER_REGISTERS],
        )


@gluon.constexpr_function
def last_part_longer(packed, rows, stages):
    """By how many blocks the last of a tile's parts is longer. Blocks of a packed weight take the least time for up to
    64 rows of x where a program, by its stages, has a multiprocessor for itself.
    """
    return STORING.value + (1 if packed and rows <= 64 and stages >= 6 else 0)


@gluon.jit
def _load(x, elements, scales, stages, work, config: gl.constexpr):
    """The one warp that loads: fills a stage as soon as its consumers have left it, but the first one, which is on its
    way.
    """
    empty = stages[4]
    first, steps = work[3], work[4]
    STAGES: gl.constexpr = config[4]
    stage = 1
    phase = 1
    for step in range(first + 1, first + steps):
        mbarrier.wait(empty.index(stage), phase)
        _fill(x, elements, scales, stages, work, step, stage, config)
        stage, phase = advance(stage, phase, 1, STAGES)


@gluon.jit
def _fill(x, elements, scales, stages, work, step, stage, config: gl.constexpr):
    """Has TMA fill a stage with a block of K."""
    x_stages, element_stages, scale_stages, full, _ = stages
    M, row, block_row, _, _, blocks = work
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    R: gl.constexpr = config[2]
    ready = full.index(stage)
    mbarrier.expect(ready, R * (128 * 64 + 64 * 4 * (PACKED > 0)) + BM * 128 * 2)
    if PACKED:
        block = (block_row // 2 * blocks + step) * 132  # of 128 rows: two times 64
        upper = block_row % 2
        at = [block + upper * 32, 0]
        second = [block + 64 + upper * 32, 0]
        load_box(scales, [block + 128 + upper * 2, 0], ready, scale_stages.index(stage))
    else:
        at = [block_row * 64, step * 32]
        second = [block_row * 64, step * 32 + 16]
    load_box(elements, at, ready, element_stages.index(stage * 2))
    load_box(elements, second, ready, element_stages.index(stage * 2 + 1))
    for half in gl.static_range(2):
        load_rows(x, row, M, step * 128 + half * 64, ready, piece_of_stage(x_stages, stage, half, 2))


@gluon.jit
def _consume(stages, source, result, steps, consumer: gl.constexpr, config: gl.constexpr):
    """Four warps: 64 rows of the weight by BM rows of x, over every S-th stage; then the sum goes its way."""
    packed, scales, first, N, K = source
    bias, out, partial, stored, summed, M, N, row, column, part, parts = result
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    R: gl.constexpr = config[2]
    S: gl.constexpr = config[3]
    BOX: gl.constexpr = config[5]
    HAS_BIAS: gl.constexpr = config[6]
    r: gl.constexpr = consumer % R
    s: gl.constexpr = consumer // R
    MMA: gl.constexpr = mma_layout(BM, 4)
    if not PACKED:
        places = scale_places(scales, column + r * 64, N, K, 64, MMA) + first
        sums = _products(stages, places, steps, r, s, False, config)
    elif needs_exact(packed, N, K, out.dtype.element_ty):
        sums = _products(stages, scales, steps, r, s, True, config)
    else:
        sums = _products(stages, scales, steps, r, s, False, config)
    if S > 1:
        sums = _sums_of_groups(sums, stages, steps, summed, r, s, config)
    if s == 0:
        slots = gl.num_programs(0) * R
        slot = r * gl.num_programs(0) + gl.program_id(0)
        if part < parts - 1:
            store_sums(sums, partial, slot)
            barrier()
            say_stored(partial, stored, slot, slots, 64 * BM)
        else:
            if parts > 1:
                sums = add_stored(sums, partial, stored, slot - part, part, slots)
            _wait_until_left(stages, steps, r, s, config)
            scratch = piece_of_stage(stages[0], _own_stage(r, s, S), 0, 2)
            store_tile(sums, bias, out, M, N, row, column + r * 64, scratch, BOX, HAS_BIAS)


@gluon.jit
def _sums_of_groups(sums, stages, steps, summed, r: gl.constexpr, s: gl.constexpr, config: gl.constexpr):
    """What the S consumers of the same rows have come to together; only the first of them gets it."""
    if s > 0:
        _wait_until_left(stages, steps, r, s, config)
        memory = piece_of_stage(stages[0], _own_stage(r, s, config[3]), 0, 1)
        for i in gl.static_range(len(sums)):
            _as_row(memory[i]).store(in_order_of_registers(sums[i]))
        barrier()
        mbarrier.arrive(summed.index(r))
        return sums
    else:
        mbarrier.wait(summed.index(r), 0)
        first = _sum_of_groups(sums[0], stages[0][0], r, config)
        if len(sums) == 1:
            return (first,)
        else:
            return first, _sum_of_groups(sums[1], stages[0][1], r, config)


@gluon.jit
def _sum_of_groups(total, x_stages, r: gl.constexpr, config: gl.constexpr):
    S: gl.constexpr = config[3]
    flat = in_order_of_registers(total)
    for s in gl.static_range(1, S):
        flat += _as_row(x_stages.index(_own_stage(r, s, S))).load(flat.type.layout)
    return as_before(flat, total)


@gluon.constexpr_function
def _own_stage(r, s, groups):
    """One of a consumer's stages, each another one. In the end its rows of x are memory for the consumer's sums, which
    take as much, and for its tile of the result, which takes half.
    """
    return s + r * groups


@gluon.jit
def _wait_until_left(stages, steps, r: gl.constexpr, s: gl.constexpr, config: gl.constexpr):
    """Until all consumers that share a consumer's own stage have left it for the last time."""
    R: gl.constexpr = config[2]
    STAGES: gl.constexpr = config[4]
    if R > 1:
        stage: gl.constexpr = _own_stage(r, s, config[3])
        times = (steps - stage + STAGES - 1) // STAGES  # that the stage was filled
        mbarrier.wait(stages[4].index(stage), (times - 1) & 1, pred=times > 0)


@gluon.jit
def _as_row(rows):
    return reinterpret(rows, gl.float32, [rows.shape[0] * 32], _ROW)


@gluon.jit
def _products(
    stages,
    places,
    steps,
    r: gl.constexpr,
    s: gl.constexpr,
    EXACT: gl.constexpr,
    config: gl.constexpr,
):
    """The sum over a consumer's stages. Scales of a canonical weight are loaded from their ``places`` a stage ahead."""
    x_stages, element_stages, scale_stages, full, empty = stages
    PACKED: gl.constexpr = config[0]
    BM: gl.constexpr = config[1]
    R: gl.constexpr = config[2]
    S: gl.constexpr = config[3]
    STAGES: gl.constexpr = config[4]
    MMA: gl.constexpr = mma_layout(BM, 4)
    DTYPE: gl.constexpr = x_stages[0].dtype
    sums = zeros(64, BM, 4)
    stage = s
    phase = 0
    if not PACKED:
        next_scales = gl.load(places + gl.minimum(s, steps - 1))
    for step in range(s, steps, S):
        if not PACKED:
            scales = next_scales
            next_scales = gl.load(places + gl.minimum(step + S, steps - 1))
        mbarrier.wait(full.index(stage), phase)
        for half in gl.static_range(2):  # the second half is decoded while the first is multiplied
            elements = _of_consumer(element_stages.index(stage * 2 + half), r, R)
            if PACKED:
                codes = _of_consumer(scale_stages.index(stage), r, R)
                weight = weight_fragment(elements, codes, half, 64, MMA, DTYPE, PACKED == 2, EXACT)
            else:
                weight = canonical_fragment(elements, scales, half, 64, MMA, DTYPE)
            sums = multiply(weight, piece_of_stage(x_stages, stage, half, 2), sums)
        sums = wait_for_all_but(0, sums)
        mbarrier.arrive(empty.index(stage))
        stage, phase = advance(stage, phase, S, STAGES)
    return sums


@gluon.jit
def _of_consumer(loaded, r: gl.constexpr, R: gl.constexpr):
    """What one of R consumers multiplies of what was loaded for all."""
    ROWS: gl.constexpr = loaded.shape[0] // R
    return loaded.slice(r * ROWS, ROWS)
