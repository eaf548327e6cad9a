"""The header of a safetensors file: which tensors it has, with every offset checked against the file's length.

It is JSON behind its length in 8 bytes, little endian; it names dtype, shape and byte offsets of every tensor. Source:
the format's description in the safetensors repository (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, listed

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
"""Names in headers of the dtypes that can be read."""
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_COARSEST = 2_000_000_000  # ns within which two changes of a file may get the same time: FAT counts in 2 seconds


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


class State(NamedTuple):
    """By what a change of a file, or another one in its place, is noticed without reading it; times are in ns."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: FileIO) -> State:
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def telling(self) -> bool:
        """Whether a change of the file from now on is sure to show: one just after another may have the same time."""
        return abs(time.time_ns() - self.modified) > _COARSEST


@dataclass
class Header:
    """What one file says of its tensors, and by what it is known again.

    Attributes:
        infos: of its tensors, by name, in order.
        starts: the byte of the file at which each begins.
        metadata: its ``__metadata__``.
        size: of the whole file, in bytes.
        length: of the header, with the 8 bytes before it.
        digest: of these bytes.
        state: of the file with these bytes in it; None while it tells too little.
    """

    infos: dict[str, TensorInfo]
    starts: dict[str, int]
    metadata: dict[str, str]
    size: int
    length: int
    digest: bytes
    state: State | None

    def is_of(self, file: FileIO) -> bool:
        """Whether ``file`` begins with this header and is as long as it was; its bytes are compared where its state
        does not tell.
        """
        state = State.of(file)
        if state == self.state:
            return True
        file.seek(0)
        if state.size != self.size or _digest(file.read(self.length)) != self.digest:
            return False
        self.state = state if state.telling else None
        return True


def regular(path: Path) -> FileIO:
    """Opens a file to read from it. Raises OSError, and CheckpointError unless it is a regular file: opening a pipe
    would wait for someone to write into it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, or no regular one")
    return path.open("rb", buffering=0)


def read_header(path: Path, file: FileIO) -> Header:
    """The header of ``file``, opened at ``path``, with every offset checked against the file's length.

    Raises:
        CheckpointError: not safetensors, truncated, or offsets that overlap, leave gaps or lie. OSError.
    """
    state = State.of(file)
    known = state if state.telling else None  # before anything is read
    text = _text(path, file, state.size)
    entries = _parsed(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to strings")
    starts = _starts(path, entries, state.size - len(text))
    try:
        with safe_open(path, framework="pt"):  # what it does not take is not to be found out halfway through a model
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not taken by safetensors: {error}") from error
    infos = {name: TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path) for name, entry in entries.items()}
    starts = {name: len(text) + start for name, start in starts.items()}
    return Header(infos, starts, metadata, state.size, len(text), _digest(text), known)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _text(path: Path, file: FileIO, size: int) -> bytes:
    """The header with the length before it, of a file of ``size`` bytes."""
    file.seek(0)
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(f"{path}: truncated or not safetensors: {size} bytes, a header of {length} announced")
    return first + file.read(length)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object of the header."""
    try:
        header = json.loads(text[8:].decode("utf-8"), object_pairs_hook=_unique)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: its header is not JSON, or names a tensor twice: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{listed({name for name in names if names.count(name) > 1})} twice")
    return entries


def _starts(path: Path, entries: dict[str, Any], data_bytes: int) -> dict[str, int]:
    """Where in the data each tensor begins; together they must be all of it."""
    spans = sorted((_span(path, name, entry, data_bytes), name) for name, entry in entries.items())
    end = 0
    for (start, stop), name in spans:
        if start != end:
            raise CheckpointError(
                f"{path}: {name} starts at byte {start} of the data, {end} is the end of the one before"
            )
        end = stop
    if end != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes} bytes of data, but the tensors take {end}: truncated or damaged")
    return {name: start for (start, _), name in spans}


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
