"""Safetensors files as one store of named tensors: headers read and checked at once, values only when asked for.

The header of a safetensors file is JSON behind its length in 8 bytes, little endian; it names dtype, shape and byte
offsets of every tensor. Source: the format's description in the safetensors repository (README, "Format").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .documents import SAFETENSORS_INDEX, read_json
from .errors import CheckpointError, listed

EVERYTHING = slice(None)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(.+)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")
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


@dataclass
class TensorFiles(Mapping[str, TensorInfo]):
    """The tensors of one or many safetensors files, by name.

    Attributes:
        root: the folder, or the single file.
        paths: the files, in order.
        metadata: the ``__metadata__`` of all headers, one dict.
        disagreeing: keys to which the metadata of two files gives different values.
    """

    root: Path
    paths: list[Path]
    infos: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    disagreeing: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> TensorInfo:
        return self.infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def read(self, name: str, *part: slice) -> Tensor:
        """The tensor ``name`` as it is stored, in memory of its own; or the ``part`` of its last dimensions.

        Raises:
            CheckpointError: the file has changed since its header was read, or cannot be read.
        """
        info = self.infos[name]
        try:
            with safe_open(info.file, framework="pt") as file:
                now = file.get_slice(name)
                if (now.get_dtype(), tuple(now.get_shape())) != (info.dtype, info.shape):
                    raise CheckpointError(
                        f"{info} has become {now.get_dtype()} {now.get_shape()}: the file has changed"
                    )
                if any(each != EVERYTHING for each in part):
                    everything = [EVERYTHING] * (len(info.shape) - len(part))
                    return now[(*everything, *part)].clone(memory_format=torch.contiguous_format)
                return file.get_tensor(name).clone()  # not the file itself, which may be replaced under us
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read: {error}") from error


def open_files(path: Path) -> TensorFiles:
    """The safetensors files of a checkpoint: those of its index, or all of a folder, or one file.

    Raises:
        CheckpointError: there is none, one is damaged, the index and the files do not agree, or a tensor is in two.
    """
    if path.is_file():
        if path.name.endswith(SAFETENSORS_INDEX):
            return _from_index(path.parent, path)
        _refuse_pickles([path])
        return merged(path, [path])
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    indices = sorted(path.glob("*" + SAFETENSORS_INDEX))
    if len(indices) > 1:
        raise CheckpointError(f"{path} has more than one index: {listed(each.name for each in indices)}")
    if indices:
        return _from_index(path, indices[0])
    paths = sorted(path.glob("*.safetensors"))
    if not paths:
        _refuse_pickles(sorted(path.iterdir()))
        raise CheckpointError(f"{path}: no .safetensors file, found {listed(each.name for each in path.iterdir())}")
    _check_series(path, paths)
    return merged(path, paths)


def _refuse_pickles(paths: list[Path]) -> None:
    pickles = [path.name for path in paths if path.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{listed(pickles)}: pickles can run code when they are loaded and are not read: "
            "save the model as safetensors (save_pretrained does)"
        )


def _from_index(folder: Path, index: Path) -> TensorFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor name to file, got {weight_map!r:.80}")
    for tensor, name in weight_map.items():
        _check_shard_name(index, tensor, name)
    files = merged(folder, [folder / name for name in sorted(set(weight_map.values()))])
    for tensor, name in weight_map.items():
        info = files.infos.get(tensor)
        if info is None or info.file.name != name:
            where = "in no file" if info is None else f"in {info.file.name}"
            raise CheckpointError(f"{index}: {tensor} is said to be in {name}, but is {where}")
    unlisted = [str(info) for info in files.infos.values() if info.name not in weight_map]
    if unlisted:
        raise CheckpointError(f"{index}: tensors that the index does not list: {listed(unlisted)}")
    return files


def _check_shard_name(index: Path, tensor: str, name: object) -> None:
    """A shard is a file beside its index: no path, which could lead anywhere."""
    if not isinstance(name, str) or name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: {tensor} is said to be in {name!r}, which is not the name of a .safetensors file beside it"
        )


def _check_series(folder: Path, paths: list[Path]) -> None:
    """Without an index, nothing but the names of shards tells that one is missing."""
    series: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, (_SHARD.fullmatch(path.name) for path in paths)):
        stem, number, total = match.groups()
        series.setdefault((stem, total), set()).add(number)
    for (stem, total), numbers in series.items():
        if len(numbers) < int(total):
            raise CheckpointError(
                f"{folder}: of the {int(total)} files {stem}-*-of-{total}.safetensors there are only {listed(numbers)}"
            )


def merged(root: Path, paths: list[Path]) -> TensorFiles:
    """The tensors of all ``paths``; CheckpointError where one is damaged, or a tensor is in two."""
    files = TensorFiles(root, paths, {})
    for path in paths:
        infos, metadata = read_header(path)
        for info in infos:
            first = files.infos.setdefault(info.name, info)
            if first is not info:
                raise CheckpointError(f"{info.name} is in two files: {first.file.name} and {path.name}")
        for key, value in metadata.items():
            if files.metadata.setdefault(key, value) != value:
                files.disagreeing.add(key)
    return files


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
