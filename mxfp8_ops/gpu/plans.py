"""Which kernel multiplies a packed weight, and how it is cut up: a table of what was fastest, by rules.

Measured on an H100 (132 multiprocessors) with weights from 1024x4096 to 28672x8192. The rules speak of how many
programs there are for a chip, so they hold for other shapes and for Hopper chips of other sizes. ``MXFP8_AUTOTUNE=1``
measures the plans of ``candidates`` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

REGISTERS = 65536
"""Of a multiprocessor."""

# Microseconds on an H100, for the choice between tiles of `Wide`.
_BLOCK = {256: 1.32, 128: 0.87}  # a block of 128 elements of K, where a tile has a multiprocessor for itself
_START = 3.0  # of a tile: loading its first stages, and storing it
_ADD = 2.0  # the launch of the kernel that adds up parts
_BYTES = 3e6  # moved in a microsecond when parts are stored and read


@dataclass(frozen=True)
class Direct:
    """The kernel in ``direct``: rows of x (8), warps of a program, registers of a lane."""

    rows: int
    warps: int
    registers: int


@dataclass(frozen=True)
class Skinny:
    """The kernel in ``skinny``: rows of x, consumers along N and along K, stages, registers of a consumer's lane and
    of any lane at the start (0: as many as there are), parts of a tile.
    """

    rows: int
    across: int
    along: int
    stages: int
    consumer_registers: int
    registers: int
    parts: int = 1


@dataclass(frozen=True)
class Wide:
    """The kernel in ``wide``: rows of x, stages, registers (0: all), parts of the last ``split`` tiles."""

    rows: int
    stages: int
    registers: int
    split: int = 0
    parts: int = 1


Plan: TypeAlias = Direct | Skinny | Wide


def plan(m: int, n: int, k: int, processors: int) -> Plan:
    """How to multiply ``m`` rows of x by a weight ``[n, k]`` on a chip of as many multiprocessors."""
    if m <= 4 or (m <= 8 and n < 24 * processors):  # as few rows or outputs as that
        return _direct(n, processors)
    if m <= 128:
        return _skinny(m, n, k, processors)
    return _wide(m, n, k, processors)


def candidates(m: int, n: int, k: int, processors: int) -> Sequence[Plan]:
    """Plans worth measuring."""
    blocks = divided(k, 128)
    if m <= 4:
        return _direct_choices()
    if m <= 128:
        rows = _power_of_two(m)
        shapes = {
            16: ((1, 1, 5, 240, 64), (1, 2, 6, 96, 72), (1, 4, 12, 96, 0), (2, 2, 8, 96, 0)),
            32: ((1, 1, 5, 240, 64), (1, 2, 4, 104, 80), (1, 4, 8, 96, 0), (2, 2, 6, 96, 0)),
            64: ((1, 1, 4, 240, 128), (1, 2, 6, 168, 0), (2, 1, 6, 240, 0), (2, 2, 4, 96, 0)),
            128: ((2, 1, 4, 240, 0), (1, 2, 4, 168, 0), (2, 1, 3, 240, 0)),
        }[max(rows, 16)]
        most = max(1, min(blocks, 8 * processors // divided(n, 64)))
        choices = [Skinny(rows, *shape, parts=p) for shape in shapes for p in (1, 2, 3, 4, 6, 8) if p <= most]
        return [*choices, *_direct_choices()] if rows == 8 else choices
    return _wide_choices(m, n, k, processors)


def _direct_choices() -> list[Direct]:
    return [Direct(8, warps, registers) for warps in (2, 4, 8, 16) for registers in (64, 72, 80)]


def _direct(n: int, processors: int) -> Direct:
    """As many warps as keep the chip's memory busy; as many registers as let every program start at once."""
    programs = divided(n, 16)
    warps = 8 if programs < 3 * processors else 4
    for registers in (80, 72, 64):
        if programs <= processors * (REGISTERS // (registers * 32 * warps)):
            return Direct(8, warps, registers)
    return Direct(8, warps, 72)


def _skinny(m: int, n: int, k: int, processors: int) -> Skinny:
    """Where there are several tiles for each multiprocessor, programs are small, so that several run at once; with
    about one, it gets more consumers; with less, tiles are cut along K.
    """
    rows = _power_of_two(m)
    tiles = divided(n, 64)
    many = tiles > 1.2 * processors
    if rows <= 16:
        chosen = Skinny(rows, 1, 2, 6, 96, 72) if tiles > 0.8 * processors else Skinny(rows, 1, 4, 12, 96, 0)
    elif rows == 32:
        chosen = Skinny(32, 1, 2, 4, 104, 80) if many else Skinny(32, 1, 4, 8, 96, 0)
    elif rows == 64:
        chosen = Skinny(64, 1, 1, 4, 240, 128) if many else Skinny(64, 1, 2, 6, 168, 0)
    else:
        chosen = Skinny(128, 2, 1, 4, 240, 0) if tiles > 1.5 * processors else Skinny(128, 1, 2, 4, 168, 0)
    programs = divided(n, 64 * chosen.across)
    blocks = divided(k, 128)
    most = max(1, min(4 if rows > 16 else 2, blocks // (4 * chosen.along)))
    parts = min(most, max(1, processors // programs))
    if rows <= 32 and programs > processors // 4 and chosen.along == 4:
        parts = 1  # four consumers share the work of a tile as well as two programs would
    return replace(chosen, parts=parts)


def _wide(m: int, n: int, k: int, processors: int) -> Wide:
    choices = _wide_choices(m, n, k, processors)
    return min(choices, key=lambda choice: _microseconds(choice, m, n, k, processors))


def _wide_choices(m: int, n: int, k: int, processors: int) -> list[Wide]:
    """Tiles of 256 or 128 rows, whole, all split, or with those split that would leave the chip half empty."""
    choices = []
    for shape in (Wide(256, 5, 0), Wide(128, 4, 128)):
        tiles = divided(n, 128) * divided(m, shape.rows)
        rest = tiles % processors
        choices.append(shape)
        for parts in range(2, min(5, divided(k, 128)) + 1):
            if tiles * parts <= 2 * processors:
                choices.append(replace(shape, split=tiles, parts=parts))
            elif rest * parts <= 2 * processors and 0 < rest < tiles and shape.rows == 256:
                choices.append(replace(shape, split=rest, parts=parts))
    return choices


def _microseconds(choice: Wide, m: int, n: int, k: int, processors: int) -> float:
    """What a choice will take, roughly: rounds of tiles on the chip, and what parts cost."""
    tiles = divided(n, 128) * divided(m, choice.rows)
    tile = divided(k, 128) * _BLOCK[choice.rows] + _START
    part = tile / choice.parts + _START * (1 - 1 / choice.parts)
    whole = tiles - choice.split
    if choice.rows == 128 and whole > processors:  # two at a time on a multiprocessor, of which neither waits
        time = divided(whole, 2 * processors) * tile * 1.8
    else:
        time = divided(whole, processors) * tile
    if choice.parts > 1:
        time += divided(choice.split * choice.parts, processors) * part + _ADD
        time += choice.split * choice.parts * 128 * choice.rows * 8 / _BYTES
    return time


def divided(length: int, size: int) -> int:
    """``length / size``, rounded up."""
    return -(-length // size)


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()
