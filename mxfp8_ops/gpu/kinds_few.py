"""The kinds of the kernels for few rows of x: how their programs cut up the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from .counts import REGISTERS, divided


class _ToRegisters:
    """Kernels whose warps stand along K and load the weight to registers, of which there are few."""

    warps: int
    blocks: int
    registers: int

    @property
    def together(self) -> int:
        """Blocks of K that a program takes in a turn."""
        return self.warps * self.blocks

    @property
    def at_once(self) -> int:
        """Programs that a multiprocessor runs at the same time."""
        return REGISTERS // (self.registers * 32 * self.warps)


@dataclass(frozen=True)
class Direct(_ToRegisters):
    """The kernel in ``direct``: rows of x (4 or 8), tiles of 8 outputs and warps of a program, blocks of K that a warp
    takes in a turn, registers of a lane.
    """

    rows: int
    tiles: int
    warps: int
    blocks: int
    registers: int = 64

    @property
    def constants(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.rows, self.tiles, self.warps, self.blocks

    def programs(self, n: int) -> int:
        """For so many outputs."""
        return divided(2 * divided(n, 16), self.tiles)


@dataclass(frozen=True)
class Row(Direct):
    """The kernel in ``row``, for one row of x."""

    @property
    def constants(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.tiles, self.warps, self.blocks

    def memory(self, k: int) -> int:
        """Bytes of shared memory for x that the programs of a multiprocessor take, two for an element of a row whose
        length is a power of two.
        """
        return self.at_once * (2 << (k - 1).bit_length())


@dataclass(frozen=True)
class Vectors(_ToRegisters):
    """The kernel in ``vectors``, on weights as they are stored: rows of x (4, 8 or 16), outputs (8 or 16) and warps of
    a program, blocks of K that a warp takes in a turn, registers of a lane.
    """

    rows: int
    outputs: int
    warps: int
    blocks: int
    registers: int = 64

    @property
    def groups(self) -> int:
        """Of K, which share a matrix instruction: 2 where outputs or rows of x do not fill it."""
        return 2 if self.outputs == 8 or self.rows == 4 else 1

    @property
    def constants(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.rows, self.outputs, self.groups, self.warps, self.blocks

    def programs(self, n: int) -> int:
        """For so many outputs."""
        return divided(n, self.outputs)


@dataclass(frozen=True)
class Narrow:
    """The kernel in ``narrow``: rows of x (8, 16 or 32), warps of a program, stages."""

    rows: int
    warps: int
    stages: int

    blocks: ClassVar = 1
    """Of K, that a warp takes in a turn."""

    @property
    def together(self) -> int:
        """Blocks of K that a program takes in a turn."""
        return self.warps

    @property
    def box(self) -> int:
        """Rows of x in a copy: half of them, so that all are there even if x has just more than half, but not less than
        8, after which the order in shared memory repeats. A single warp has no time for a second copy.
        """
        return self.rows if self.warps == 1 else max(self.rows // 2, 8)

    def programs(self, n: int) -> int:
        """For so many outputs."""
        return divided(n, 32)

    @property
    def at_once(self) -> int:
        """Programs that a multiprocessor runs at the same time: of several warps one, which have all registers then;
        else as many as it has memory for.
        """
        return 1 if self.warps > 1 else 8 if self.rows == 8 else 6


Few: TypeAlias = Direct | Narrow | Vectors
