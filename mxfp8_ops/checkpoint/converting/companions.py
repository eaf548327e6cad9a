"""What belongs to a checkpoint beside its tensors: config.json, which is rewritten, and files that come along."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..documents import COMPRESSED_CONFIG, CONFIG, INDEX_SUFFIX, MODELOPT_CONFIG, MODELSLIM_DESCRIPTION, Json
from ..files import PICKLES
from .writing import copy_file

_WEIGHTS = (".safetensors", *PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".npy", ".tflite", ".pb")
_REWRITTEN = (CONFIG, MODELOPT_CONFIG, MODELSLIM_DESCRIPTION, COMPRESSED_CONFIG)
_QUANTIZATION = ("quantization_config", "compression_config")


class Companion(NamedTuple):
    """A file that is to come along: where it is, and where it goes, relative to the checkpoint."""

    path: Path
    name: str


def config(source: Json, quantization: Json | None, dtype: torch.dtype | None) -> Json:
    """config.json of the result.

    Args:
        source: that of the source, empty without one.
        quantization: the new ``quantization_config``, None for none.
        dtype: of a model that is no longer quantized; None leaves what the source says.
    """
    made = _plain(source, None if dtype is None else str(dtype).removeprefix("torch."))
    return made if quantization is None else {**made, "quantization_config": quantization}


def _plain(source: Json, dtype: str | None) -> Json:
    """Without what it says of quantization; configs of parts of the model likewise."""
    made = {}
    for key, value in source.items():
        if key in _QUANTIZATION:
            continue
        if key.endswith("_config") and isinstance(value, dict):
            value = _plain(value, dtype)
        elif key in ("dtype", "torch_dtype") and dtype is not None and isinstance(value, str):
            value = dtype
        made[key] = value
    return made


def companions(source: Path) -> tuple[list[Companion], list[str]]:
    """The other files of a folder that belong to its model, such as those of the tokenizer, and links that lead out of
    it, which are not followed. Weights, what describes their quantization, and hidden files stay behind. A file that
    stands for itself has no companions.

    Links into the blobs of a cache of the Hugging Face hub are files of the folder.
    """
    found: list[Companion] = []
    outside: list[str] = []
    if not source.is_dir():
        return found, outside
    roots = [source.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        if any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            if path.is_file():
                found.append(Companion(path, name))
        elif path.is_symlink():
            outside.append(name)
    return found, outside


def copy(files: list[Companion], target: Path) -> None:
    """Copies files into a folder."""
    for path, name in files:
        copy_file(path, target / name)


def _files(source: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in linked)
        for name in sorted([*names, *linked]):
            path = Path(folder, name)
            if name.startswith(".") or name.endswith((*_WEIGHTS, INDEX_SUFFIX)):
                continue
            if (Path(folder) == source and name in _REWRITTEN) or not _regular(path):
                continue
            yield path


def _regular(path: Path) -> bool:
    """Whether it is a file or a link, no pipe or device, which could be read for ever."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)
