"""Safetensors files as one store of named tensors: headers read and checked at once, values only when asked for.

A file is open only while a tensor is read. Its header is kept, and parsed again only when the file has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from torch import Tensor

from .documents import SAFETENSORS_INDEX, read_json
from .errors import CheckpointError, listed
from .headers import Header, TensorInfo, read_header, regular
from .values import read_values

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(.+)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")


@dataclass
class TensorFiles(Mapping[str, TensorInfo]):
    """The tensors of one or many safetensors files, by name.

    Attributes:
        root: the folder, or the single file.
        paths: the files, in order.
        metadata: the ``__metadata__`` of all headers, one dict.
        disagreeing: keys to which the metadata of two files gives different values.
        headers: of each file, as it was read last.
    """

    root: Path
    paths: list[Path]
    infos: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    disagreeing: set[str] = field(default_factory=set)
    headers: dict[Path, Header] = field(default_factory=dict, repr=False)

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
            with regular(info.file) as file:
                header = self._header(info.file, file)
                if name not in header.infos:
                    raise CheckpointError("the file has changed, there is no such tensor in it")
                now = header.infos[name]
                if (now.dtype, now.shape) == (info.dtype, info.shape):
                    return read_values(file, header.starts[name], info, *part)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read: {error}") from error
        raise CheckpointError(f"{info} has become {now.dtype} {list(now.shape)}: the file has changed")

    def _header(self, path: Path, file: FileIO) -> Header:
        """That of ``file``, opened at ``path``: parsed again only where it is another one than before."""
        header = self.headers[path]
        if not header.is_of(file):
            header = self.headers[path] = read_header(path, file)
        return header


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
        header = files.headers[path] = _first_header(path)
        for info in header.infos.values():
            first = files.infos.setdefault(info.name, info)
            if first is not info:
                raise CheckpointError(f"{info.name} is in two files: {first.file.name} and {path.name}")
        for key, value in header.metadata.items():
            if files.metadata.setdefault(key, value) != value:
                files.disagreeing.add(key)
    return files


def _first_header(path: Path) -> Header:
    try:
        with regular(path) as file:
            return read_header(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
