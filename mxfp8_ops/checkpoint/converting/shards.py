"""The files of a checkpoint to be: which tensors each holds, in which order, and its header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ..documents import SAFETENSORS_INDEX, Json
from ..headers import TensorInfo


class Part(Protocol):
    """What is written together, without another tensor in between."""

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Headers of its tensors, which have elements of one size."""
        ...


AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass(frozen=True)
class Shard(Generic[AnyPart]):
    """One file of a checkpoint to be."""

    name: str
    parts: tuple[AnyPart, ...]

    @property
    def tensors(self) -> list[TensorInfo]:
        return [info for part in self.parts for info in part.outputs]

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(info.nbytes for info in self.tensors)

    def header(self) -> bytes:
        """Length, JSON and padding: all that precedes the bytes of the tensors, which then start at a multiple of 8."""
        entries: Json = {"__metadata__": {"format": "pt"}}
        end = 0
        for info in self.tensors:
            start, end = end, end + info.nbytes
            entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def split(parts: Sequence[AnyPart], most: int) -> list[Shard[AnyPart]]:
    """``parts`` in order, dealt out to shards of at most ``most`` bytes, unless a single part is larger. Within a shard
    the largest elements come first, so that each tensor starts at a multiple of its element size: readers map them.
    """
    groups: list[list[AnyPart]] = [[]]
    size = 0
    for part in parts:
        nbytes = sum(info.nbytes for info in part.outputs)
        if groups[-1] and size + nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += nbytes
    count = len(groups)
    numbers = [f"-{n:05}-of-{count:05}" for n in range(1, count + 1)] if count > 1 else [""]
    ordered = [sorted(group, key=lambda part: -max(info.bits for info in part.outputs)) for group in groups]
    return [Shard(f"model{number}.safetensors", tuple(group)) for number, group in zip(numbers, ordered, strict=True)]


def index(shards: Sequence[Shard[Any]]) -> dict[str, Json]:
    """Name and content of the index; nothing for a single shard, which needs none."""
    if len(shards) == 1:
        return {}
    files = {info.name: shard.name for shard in shards for info in shard.tensors}
    total = sum(shard.nbytes for shard in shards)
    return {f"model{SAFETENSORS_INDEX}": {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}}
