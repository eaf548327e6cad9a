"""What plans count with."""

from __future__ import annotations

REGISTERS = 65536
"""Of a multiprocessor."""


def divided(length: int, size: int) -> int:
    """``length / size``, rounded up."""
    return -(-length // size)
