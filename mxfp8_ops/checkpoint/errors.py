"""What is wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or contradicts itself: says which file and which tensor."""


class Mismatch(CheckpointError):
    """A checkpoint that was written, read again, is not what it should be."""


def listed(names: Iterable[object], most: int = 8) -> str:
    """Some names in one line: the first ``most`` of them, and how many more there are."""
    words = sorted(map(str, names))
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
