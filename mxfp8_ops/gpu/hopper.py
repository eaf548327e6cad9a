"""Launches the kernels for Hopper chips, on packed and on canonical weights. Arguments are checked already."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from .. import packing, settings
from . import partial_sums, vectors
from .counts import divided
from .direct import mxfp8_linear_direct
from .heights import box_rows
from .kinds_few import Direct, Narrow, Row, Vectors
from .launch import box, launch
from .narrow import mxfp8_linear_narrow
from .plans import Plan, Skinny, Wide, candidates, plan, tiles_of
from .row import mxfp8_linear_row
from .skinny import mxfp8_linear_skinny
from .tune import best
from .wide import mxfp8_linear_wide

_X = gl.NVMMASharedLayout(128, 16, 2)
_PACKED_WORDS = gl.NVMMASharedLayout(128, 32, 2)
_PACKED_SCALES = gl.NVMMASharedLayout(0, 32, 2)
_ROWS_OF_BLOCKS = gl.NVMMASharedLayout(128, 16, 3)
_WORDS_OF_BLOCKS = gl.NVMMASharedLayout(0, 32, 5)
_SCALES_OF_BLOCKS = gl.NVMMASharedLayout(0, 32, 3)
_CANONICAL_WORDS = gl.NVMMASharedLayout(64, 32, 2)


class Canonical(NamedTuple):
    """A weight as it is stored, in words of four codes: ``weight [N, K / 4]`` and ``scale [N, K / 128]`` int32."""

    weight: Tensor
    scale: Tensor


def linear_packed(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    """``x [M, K]`` bfloat16 or float16, contiguous and at an address that is a multiple of 16, with M > 0; gives
    ``[M, n]``.
    """
    return _linear(x, packed, n, bias)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same on ``weight [N, K]`` and ``scale [N, K/32]``, contiguous and at such addresses, K a multiple of 128."""
    return _linear(x, Canonical(weight.view(torch.int32), scale.view(torch.int32)), len(weight), bias)


def _linear(x: Tensor, source: Tensor | Canonical, n: int, bias: Tensor | None) -> Tensor:
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    _run(_plan(x, source, bias, out), x, source, bias, out)
    return out


_plans: dict[tuple[Any, ...], Plan] = {}


def _plan(x: Tensor, source: Tensor | Canonical, bias: Tensor | None, out: Tensor) -> Plan:
    """The model's plan, or the fastest one where ``MXFP8_AUTOTUNE`` is on when a problem is first met."""
    (m, k), n = x.shape, out.shape[1]
    packed = not isinstance(source, Canonical)
    problem = (x.device, x.dtype, m, n, k, packed)
    known = _plans.get(problem)
    if known is not None:
        return known
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    chosen = plan(m, n, k, processors, packed)
    if settings.autotune():
        if torch.cuda.is_current_stream_capturing():
            return chosen  # for now: it cannot be measured here
        choices = candidates(m, n, k, processors, packed)
        family = "packed" if packed else "canonical"
        chosen = best(family, (m, n, k, x.dtype), choices, chosen, lambda p: _run(p, x, source, bias, out))
    _plans[problem] = chosen
    return chosen


def _run(chosen: Plan, x: Tensor, source: Tensor | Canonical, bias: Tensor | None, out: Tensor) -> None:
    if isinstance(chosen, Skinny):
        _skinny(chosen, x, source, bias, out)
    elif isinstance(chosen, Wide):
        _wide(chosen, x, source, bias, out)
    elif isinstance(chosen, Vectors):
        assert isinstance(source, Canonical)
        vectors.run(chosen, x, source.weight, source.scale, bias, out)
    else:
        assert isinstance(source, Tensor)
        if isinstance(chosen, Row):
            _row(chosen, x, source, bias, out)
        elif isinstance(chosen, Direct):
            _direct(chosen, x, source, bias, out)
        else:
            _narrow(chosen, x, source, bias, out)


def _direct(chosen: Direct, x: Tensor, source: Tensor, bias: Tensor | None, out: Tensor) -> None:
    (m, k), n = x.shape, out.shape[1]
    launch(
        mxfp8_linear_direct,
        (chosen.programs(n),),
        (x.view(torch.int32), source, x if bias is None else bias, out, m, n, k),
        (*chosen.constants, k % (128 * chosen.together) != 0, _for_float16(source), bias is not None),
        num_warps=chosen.warps,
        maxnreg=chosen.registers,
        dependent=settings.dependent_launch(),
    )


def _row(chosen: Row, x: Tensor, source: Tensor, bias: Tensor | None, out: Tensor) -> None:
    n, k = out.shape[1], x.shape[1]
    launch(
        mxfp8_linear_row,
        (chosen.programs(n),),
        (x.view(torch.int32), source, x if bias is None else bias, out, n),
        (k, *chosen.constants, _for_float16(source), bias is not None),
        num_warps=chosen.warps,
        maxnreg=chosen.registers,
        dependent=settings.dependent_launch(),
    )


def _narrow(chosen: Narrow, x: Tensor, source: Tensor, bias: Tensor | None, out: Tensor) -> None:
    (m, k), n = x.shape, out.shape[1]
    rows, warps, stages = chosen.rows, chosen.warps, chosen.stages
    blocks = len(source) // packing.BLOCK_ROWS
    words = packing.BLOCK_ROWS * packing.WORDS  # of a block; of its halves along k6, r6, k5
    launch(
        mxfp8_linear_narrow,
        (divided(n, 32),),
        (
            (x, box((2 * warps, chosen.box, 64), _ROWS_OF_BLOCKS), (k // 64, m, 64), (64, k, 1)),
            (source, box((warps, 2, 1, 2, 256), _WORDS_OF_BLOCKS), (blocks, 2, 2, 2, 512), (words, 2048, 1024, 512, 1)),
            (source, box((warps, 1, 32), _SCALES_OF_BLOCKS), (blocks, packing.BLOCK_ROWS, 32), (words, 32, 1)),
            source,
            x if bias is None else bias,
            out,
            m,
            n,
            k,
        ),
        (rows, warps, stages, _for_float16(source), bias is not None),
        num_warps=warps,
        dependent=settings.dependent_launch(),
    )


def _skinny(chosen: Skinny, x: Tensor, source: Tensor | Canonical, bias: Tensor | None, out: Tensor) -> None:
    (m, k), n = x.shape, out.shape[1]
    programs = tiles_of(chosen, m, n) * chosen.parts
    elements, scales, packed = _boxes(source, chosen.across)
    partial = packed
    if chosen.parts > 1:
        partial = partial_sums.memory(programs * chosen.across, 64 * chosen.rows, x.device)
    pointers = *_rows_of_x(x, chosen.rows), elements, scales, packed, x if bias is None else bias, out, partial
    launch(
        mxfp8_linear_skinny,
        (programs,),
        (*pointers, m, n, k, chosen.parts, partial_sums.STORED),
        (_packed(source), *chosen.constants, bias is not None),
        num_warps=4,
        maxnreg=chosen.registers or None,
        dependent=settings.dependent_launch(),
    )


def _wide(chosen: Wide, x: Tensor, source: Tensor | Canonical, bias: Tensor | None, out: Tensor) -> None:
    (m, k), n = x.shape, out.shape[1]
    tiles = tiles_of(chosen, m, n)
    elements, scales, packed = _boxes(source, 2)
    partial = packed
    if chosen.shared:
        partial = partial_sums.memory(chosen.programs, chosen.rows * chosen.columns, x.device)
    pointers = *_rows_of_x(x, chosen.rows), elements, scales, packed, x if bias is None else bias, out, partial
    launch(
        mxfp8_linear_wide,
        (chosen.programs if chosen.shared else min(tiles, chosen.programs),),
        (*pointers, m, n, k, tiles, tiles - chosen.shared, partial_sums.STORED),
        (_packed(source), *chosen.constants, bias is not None),
        num_warps=8,
        dependent=settings.dependent_launch(),
    )


def _rows_of_x(x: Tensor, rows: int) -> tuple[Any, Any]:
    """The arguments ``x`` and ``later_x`` of the kernels, for tiles of so many rows."""
    first, later = box_rows(rows, x.shape[0])
    shape, strides = tuple(x.shape), (x.shape[1], 1)
    return (x, box((first, 64), _X), shape, strides), (x, box((later, 64), _X), shape, strides) if later else x


def _packed(source: Tensor | Canonical) -> int:
    """What the kernels on tiles call PACKED."""
    return packing.PACKED_FOR[packing.packed_for(source)] if isinstance(source, Tensor) else 0


def _for_float16(packed: Tensor) -> bool:
    return packing.packed_for(packed) == torch.float16


def _boxes(source: Tensor | Canonical, rows: int) -> tuple[Any, Any, Tensor]:
    """The arguments ``elements``, ``scales`` and ``packed`` of the kernels, for tiles of ``rows`` * 64 rows of the
    weight.
    """
    if isinstance(source, Canonical):
        shape, strides = tuple(source.weight.shape), source.weight.stride()
        return (source.weight, box((rows * 64, 16), _CANONICAL_WORDS), shape, strides), source.scale, source.scale
    shape = (len(source), 32)
    words = (source, box((rows * 32, 32), _PACKED_WORDS), shape, (32, 1))
    return words, (source, box((rows * 2, 32), _PACKED_SCALES), shape, (32, 1)), source
