"""What is wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or contradicts itself: says which file and which tensor."""


class Mismatch(CheckpointError):
    """A checkpoint that was written, read again, is not what it should be."""


def listed(names: object, most: int = 8) -> str:
    """Some names in one line: the first ``most`` of them, and how many more there are."""
    names = sorted(map(str, names))  # type: ignore[call-overload]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
