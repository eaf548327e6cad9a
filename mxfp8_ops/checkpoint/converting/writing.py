"""A checkpoint as it is written: shards streamed tensor by tensor into a folder that appears whole or not at all.

Everything comes to be in ``<target>.partial`` beside the target: finished shards, reports on them, and a fingerprint of
what is being written, by which a run that was killed is taken up again.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ..documents import CONFIG, Json
from ..errors import CheckpointError
from ..headers import TensorInfo
from .shards import AnyPart, Part, Shard

_FOLDERS = ("checkpoint", "reports", "replaced")
_FILES = ("unfinished", "fingerprint", "lock")
_OURS = {*_FOLDERS, *_FILES}


class Draft:
    """The folder of a checkpoint that is not finished; see ``drafting``.

    Attributes:
        target: where it will be.
        folder: where it is until then.
    """

    def __init__(self, target: Path, workplace: Path) -> None:
        self.target = target
        self.folder = workplace / "checkpoint"
        self._workplace = workplace
        self._reports = workplace / "reports"
        self._replaced = workplace / "replaced"

    def finished(self, shard: Shard[Any]) -> list[Json] | None:
        """The reports on a shard that an earlier run has finished, None where it has to be written."""
        try:
            header, path = shard.header(), self.folder / shard.name
            with path.open("rb") as file:
                same = file.read(len(header)) == header and path.stat().st_size == len(header) + shard.nbytes
            reports = json.loads((self._reports / f"{shard.name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return reports if same else None

    def write(self, shard: Shard[AnyPart], produce: Callable[[AnyPart], tuple[Sequence[Tensor], Json]]) -> list[Json]:
        """Writes a shard; it appears when it is complete and on the disk.

        Args:
            produce: the tensors of a part, on the CPU, and a report on them as JSON has it.

        Returns:
            The reports.
        """
        unfinished = self._workplace / "unfinished"
        with unfinished.open("wb") as file:
            file.write(shard.header())
            reports = [_write_part(file, part, *produce(part)) for part in shard.parts]
            _sync(file)
        write_json(self._reports / f"{shard.name}.json", reports)
        os.replace(unfinished, self.folder / shard.name)
        return reports

    def keep_only(self, shards: Sequence[Shard[Any]]) -> None:
        """Removes all but the files of ``shards``: what an earlier run had copied may have changed since."""
        names = {shard.name for shard in shards}
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()

    def publish(self) -> None:
        """Makes the folder appear as the target; what was there goes only now."""
        _sync_folder(self.folder)
        if self.target.exists():
            os.rename(self.target, self._replaced)
        os.rename(self.folder, self.target)
        _sync_folder(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Removes the workplace and all that was made in it."""
        for name in _FOLDERS:
            shutil.rmtree(self._workplace / name, ignore_errors=True)
        for name in _FILES:
            (self._workplace / name).unlink(missing_ok=True)
        with suppress(OSError):  # something of somebody else is in it
            self._workplace.rmdir()

    def start(self, fingerprint: str) -> None:
        """Takes up an earlier run of the same fingerprint, or else removes what it left."""
        state = self._workplace / "fingerprint"
        if self._replaced.exists() and not self.target.exists():
            os.rename(self._replaced, self.target)  # the run was killed between the two renames of ``publish``
        resumed = state.exists() and state.read_text(encoding="utf-8") == fingerprint and self.folder.is_dir()
        for path in (self._replaced,) if resumed else (self._replaced, self.folder, self._reports):
            shutil.rmtree(path, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self._reports.mkdir(exist_ok=True)
        state.write_text(fingerprint, encoding="utf-8")


@contextmanager
def drafting(target: Path, fingerprint: str, force: bool) -> Iterator[Draft]:
    """Yields a draft of ``target``. After an error it stays where it is if a shard is finished, so that an equal run
    goes on from there; but not after a CheckpointError, which would come again.

    Raises:
        FileExistsError: the target exists and ``force`` is off, or is no checkpoint; or something else is where the
        draft would be. RuntimeError: another process is writing it.
    """
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = target.with_name(f"{target.name}.partial")
    if workplace.exists() and (not workplace.is_dir() or {path.name for path in workplace.iterdir()} - _OURS):
        raise FileExistsError(f"{workplace} is where {target} would be written: move it away")
    with _locked(workplace, target):
        draft = Draft(target, workplace)
        draft.start(fingerprint)
        try:
            check_target(target, force)
            yield draft
        except BaseException as error:
            if isinstance(error, CheckpointError) or (draft.folder.exists() and not any(draft.folder.iterdir())):
                draft.discard()
            raise


def check_target(target: Path, force: bool) -> None:
    """Raises FileExistsError unless ``target`` is free, or ``force`` is on and it is a checkpoint."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise FileExistsError(f"{target} exists: choose another folder, or --force (force=True) to replace it")
    if not target.is_dir() or not ((target / CONFIG).exists() or any(target.glob("*.safetensors"))):
        raise FileExistsError(f"{target} is not replaced: it is no folder with a checkpoint")


def write_json(path: Path, value: object) -> None:
    """Writes JSON to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        _sync(file)


def copy_file(source: Path, target: Path) -> None:
    """Copies the content of a file to the disk, without its rights."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        _sync(file)


@contextmanager
def _locked(workplace: Path, target: Path) -> Iterator[None]:
    """Makes ``workplace``, for this process alone. The system unlocks it when the process ends, however that happens;
    where files cannot be locked, nothing does.
    """
    descriptor = None
    while descriptor is None:
        workplace.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # its owner has removed it just now
            descriptor = _lock(workplace / "lock", target)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, target: Path) -> int | None:
    """A descriptor that holds the lock; None where ``path`` is another file meanwhile."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another process is writing {target}: wait for it, or end it") from None
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _write_part(file: IO[bytes], part: Part, tensors: Sequence[Tensor], report: Json) -> Json:
    for info, tensor in zip(part.outputs, tensors, strict=True):
        _check(info, tensor)
        contiguous = tensor.contiguous()
        file.write(_bytes(contiguous))
    return report


def _check(info: TensorInfo, tensor: Tensor) -> None:
    if tuple(tensor.shape) != info.shape or tensor.nbytes != info.nbytes:
        raise CheckpointError(
            f"{info.name} was to be {info.dtype} {list(info.shape)}, but is {tensor.dtype} {list(tensor.shape)} now: "
            "the source has changed while it was read"
        )


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without NumPy."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b"")


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """So that names in a folder outlive a power cut; not every system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
