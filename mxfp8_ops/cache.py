"""The folders of this package's caches, and files that appear in them whole or not at all."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import settings

PATIENCE = 60.0
"""Seconds until the work of another process, which may have been stopped, is not waited for any more."""


def folder(purpose: str) -> Path:
    """In ``MXFP8_CACHE_DIR``, else where the system keeps caches of programs.

    Raises:
        RuntimeError: this user has no home.
    """
    own = settings.cache_dir()
    if own:
        return Path(own).expanduser() / purpose
    system = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(system) if os.path.isabs(system) else Path.home() / ".cache") / "mxfp8_ops" / purpose


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place afterwards. After an error it is gone, and ``path`` as it
    was. Any number of processes may do this at once: others find one file or another, and never half of one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def private_folders(purpose: str) -> Iterator[Path]:
    """Folders for files that are executed, which nobody else can write: the cache, one among the system's temporary
    files, and one of this process alone. Not all of them need exist or can be written to.
    """
    with contextlib.suppress(OSError, RuntimeError):
        path = folder(purpose)
        path.parent.mkdir(parents=True, exist_ok=True)
        if _make_private(path):
            yield path
    with contextlib.suppress(OSError):
        path = Path(tempfile.gettempdir()) / f"mxfp8_ops-{os.getuid()}-{purpose}"
        if _make_private(path):
            yield path
    with contextlib.suppress(OSError):
        yield _own_folder()


def _make_private(path: Path) -> bool:
    """Whether a folder, made if need be, is this user's or the system's, and can be written by no one else."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()  # a link could be turned to elsewhere later
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.getuid()) and not writable


@functools.cache
def _own_folder() -> Path:
    path = tempfile.mkdtemp(prefix="mxfp8_ops-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time, as long as all are well: it spares work, and nothing relies on it. The system unlocks
    ``path`` when its owner ends, however that happens; where files cannot be locked, nobody waits.
    """
    import fcntl

    with path.open("a") as file:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may have the file, too
