"""Launches the kernels on packed weights, for Hopper chips. Arguments are checked already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from .. import settings
from . import direct, skinny, tiles, wide
from .launch import box, launch
from .plans import Direct, Plan, Skinny, Wide, candidates, divided, plan
from .tune import best

_X = gl.NVMMASharedLayout(128, 16, 2)
_ELEMENTS = gl.NVMMASharedLayout(128, 32, 2)
_SCALES = gl.NVMMASharedLayout(0, 32, 2)
_COLUMNS = 16  # of a tile that a program of `add_parts` adds up


def linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
    """``x [M, K]`` bfloat16 or float16, contiguous and at an address that is a multiple of 16, with M > 0; gives
    ``[M, n]``.
    """
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    _run(_plan(x, packed, bias, out), x, packed, bias, out)
    return out


_plans: dict[tuple[Any, ...], Plan] = {}


def _plan(x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> Plan:
    """The table's plan, or the fastest one where ``MXFP8_AUTOTUNE`` is on when a problem is first met."""
    (m, k), n = x.shape, out.shape[1]
    problem = (x.device, x.dtype, m, n, k)
    known = _plans.get(problem)
    if known is not None:
        return known
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    chosen = plan(m, n, k, processors)
    if settings.autotune():
        if torch.cuda.is_current_stream_capturing():
            return chosen  # for now: it cannot be measured here
        choices = candidates(m, n, k, processors)
        chosen = best("packed", (m, n, k, x.dtype), choices, chosen, lambda p: _run(p, x, packed, bias, out))
    _plans[problem] = chosen
    return chosen


def _run(chosen: Plan, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if isinstance(chosen, Direct):
        _direct(chosen, x, packed, bias, out)
    elif isinstance(chosen, Skinny):
        _skinny(chosen, x, packed, bias, out)
    else:
        _wide(chosen, x, packed, bias, out)


def _direct(chosen: Direct, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
    (m, k), n = x.shape, out.shape[1]
    launch(
        direct.kernel,
        (divided(n, 16),),
        (x.view(torch.int32), packed, x if bias is None else bias, out, m, n, k),
        (chosen.rows, chosen.warps, bias is not None),
        num_warps=chosen.warps,
        maxnreg=chosen.registers,
    )


def _skinny(chosen: Skinny, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
    columns = 64 * chosen.across
    split = divided(out.shape[1], columns) * divided(x.shape[0], chosen.rows) if chosen.parts > 1 else 0
    constants = (chosen.rows, chosen.across, chosen.along, chosen.stages, chosen.consumer_registers)
    _tiled(skinny.kernel, chosen, columns, (32, 2), split, x, packed, bias, out, constants, 4)


def _wide(chosen: Wide, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
    constants = (chosen.rows, chosen.stages)
    _tiled(wide.kernel, chosen, 128, (64, 4), chosen.split, x, packed, bias, out, constants, 8)


def _tiled(
    kernel: object,
    chosen: Skinny | Wide,
    columns: int,
    boxes: tuple[int, int],
    split: int,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out: Tensor,
    constants: tuple[int, ...],
    warps: int,
) -> None:
    """Launches a kernel on tiles of ``chosen.rows`` by ``columns``, the last ``split`` of them in parts."""
    (m, k), n = x.shape, out.shape[1]
    whole = divided(n, columns) * divided(m, chosen.rows) - split
    programs = split * chosen.parts
    tile = chosen.rows * columns
    partial = torch.empty(programs * tile, dtype=torch.float32, device=x.device) if programs else out
    offset = x if bias is None else bias
    rows = packed.shape[0]
    launch(
        kernel,
        (whole + programs,),
        (
            (x, box((chosen.rows, 64), _X), (m, k), (k, 1)),
            (packed, box((boxes[0], 32), _ELEMENTS), (rows, 32), (32, 1)),
            (packed, box((boxes[1], 32), _SCALES), (rows, 32), (32, 1)),
            packed,
            offset,
            out,
            partial,
            m,
            n,
            k,
            whole,
            chosen.parts,
        ),
        (*constants, bias is not None),
        num_warps=warps,
        maxnreg=chosen.registers or None,
    )
    if programs:
        launch(
            tiles.add_parts,
            (split * (columns // _COLUMNS),),
            (partial, offset, out, m, n, whole, chosen.parts),
            (chosen.rows, columns, _COLUMNS, bias is not None),
        )
