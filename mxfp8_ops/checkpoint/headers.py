"""The header of a safetensors file: which tensors it has, with every offset checked against the file's length.

It is JSON behind its length in 8 bytes, little endian; it names dtype, shape and byte offsets of every tensor. Source:
the format's description in the safetensors repository (README, "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, listed

_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        name: in the file.
        dtype: as safetensors writes it, such as "F8_E4M3", "U8", "F8_E8M0", "BF16".
        shape: of the stored tensor.
        file: where it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.bits // 8

    @property
    def bits(self) -> int:
        """Of an element."""
        return _BITS[self.dtype]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)} in {self.file.name})"


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of one file and its metadata, with every offset checked against the file's length.

    Raises:
        CheckpointError: no such file, not safetensors, truncated, or offsets that overlap, leave gaps or lie.
    """
    header, data_bytes = _raw_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to strings")
    spans = sorted((_span(path, name, entry, data_bytes), name) for name, entry in header.items())
    end = 0
    for (start, stop), name in spans:
        if start != end:
            raise CheckpointError(
                f"{path}: {name} starts at byte {start} of the data, {end} is the end of the one before"
            )
        end = stop
    if end != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes} bytes of data, but the tensors take {end}: truncated or damaged")
    try:
        with safe_open(path, framework="pt"):  # what it does not take is not to be found out halfway through a model
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not taken by safetensors: {error}") from error
    infos = [TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path) for name, entry in header.items()]
    return infos, metadata


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON object of the header, and how many bytes follow it."""
    try:
        if not path.is_file():  # opening a pipe would wait for someone to write into it
            raise CheckpointError(f"{path}: no such file, or no regular one")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: truncated or not safetensors: {size} bytes, a header of {length} announced"
                )
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its header is not JSON, or names a tensor twice: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    return header, size - 8 - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{listed({name for name in names if names.count(name) > 1})} twice")
    return entries


def _span(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[int, int]:
    """First and last byte of a tensor in the data, as its entry says, checked against dtype and shape."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _BITS:
        raise CheckpointError(f"{path}: {name} has no known dtype: {entry!r:.80}")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name} has no proper shape and data_offsets: {entry!r:.120}")
    start, stop = offsets
    if (stop - start) * 8 != math.prod(shape) * _BITS[entry["dtype"]] or stop > data_bytes:
        raise CheckpointError(
            f"{path}: {name} ({entry['dtype']} {shape!r:.80}) cannot be the bytes {start} to {stop} of {data_bytes} "
            "that its header says: truncated or damaged"
        )
    return start, stop


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)
