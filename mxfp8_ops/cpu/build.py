"""Compiling the kernels at first use, with the machine's C++ compiler, and keeping the result on disk.

A file's name holds a hash of everything that it was made from, so what an older version has left is never found. Its
last bytes are a hash of those before: what has lost some is compiled again, where loading it could end the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import cache

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
FLAGS: tuple[str, ...] = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno")
SECONDS = 300.0
"""For one run of the compiler."""


class BuildError(Exception):
    """Why there is no library, in one line."""


def load(name: str, flags: Sequence[str], abi: int, sources: Path | None = None) -> ctypes.CDLL:
    """The library of a level, compiled for it with ``flags`` unless some process has done so before.

    Args:
        name: of the level, for people.
        abi: what its ``mxfp8_abi()`` must return.
        sources: a folder with other sources than those of the kernels, or one source.

    Raises:
        BuildError: it cannot be compiled or loaded.
    """
    if os.name != "posix":
        raise BuildError(f"not on {sys.platform}")
    compiler, code = find_compiler(), sources or SOURCES
    file = f"{name}-{_digest(compiler, flags, abi, code)}.so"
    failure = "no folder for them can be written"
    for folder in cache.private_folders("kernels"):
        library = _open(folder / file, abi)
        if library is not None:
            return library
        try:
            with cache.alone(folder / "lock"):
                library = _open(folder / file, abi)  # by whoever was in here before
                if library is None:
                    _compile(compiler, flags, code, folder / file)
        except OSError as error:
            failure = f"{folder}: {error.strerror}"
            continue
        library = library or _open(folder / file, abi)
        if library is not None:
            return library
        failure = f"{folder / file} is compiled, and cannot be loaded"
    raise BuildError(failure)


# --- the compiler ---------------------------------------------------------------------------------------


def find_compiler() -> list[str]:
    """The command of ``CXX``, else the first compiler on ``PATH``.

    Raises:
        BuildError: there is none.
    """
    words = shlex.split(os.environ.get("CXX", ""))
    if words:
        if shutil.which(words[0]) is None:
            raise BuildError(f"CXX names {words[0]!r}, which is no program")
        return words
    for each in COMPILERS:
        if shutil.which(each) is not None:
            return [each]
    raise BuildError("there is no C++ compiler: install g++, or name one in CXX")


def compiler_version() -> str:
    """The first line that the compiler says about itself; empty where there is none."""
    try:
        told = _version(tuple(find_compiler()))[-1]
    except BuildError:
        return ""
    return told.decode(errors="replace").partition("\n")[0]


def _compile(compiler: Sequence[str], flags: Sequence[str], code: Path, path: Path) -> None:
    """Writes the library.

    Raises:
        BuildError: the compiler fails. OSError: the folder cannot be written to.
    """
    sources = [str(each) for each in _files(code) if each.suffix == ".cpp"]
    with cache.replacing(path) as unfinished:
        failed = ""
        for openmp in openmp_flags():
            command = [*compiler, *FLAGS, *flags, *sources, "-o", str(unfinished), *openmp]
            failed = _run(command, path.parent)
            if not failed:
                break
        if failed:
            raise BuildError(failed)
        content = unfinished.read_bytes()
        unfinished.write_bytes(content + hashlib.sha256(content).digest())


def _run(command: Sequence[str], folder: Path) -> str:
    """What went wrong, in short; empty where nothing did."""
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} takes more than {SECONDS:.0f} s"
    except OSError as error:
        return f"{command[0]} cannot be run: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines
    return f"{command[0]} failed: {' / '.join(told[-2:]) or f'exit status {done.returncode}'}"


def openmp_flags() -> list[tuple[str, ...]]:
    """Ways to link OpenMP, the best first: with the runtime that torch runs on, so that its threads do the work, and
    with the compiler's own.
    """
    torchs = openmp_of_torch()
    shared = [] if torchs is None else [("-fopenmp", "-Wl,--as-needed", torchs)]
    return [*shared, ("-fopenmp",)]


@functools.cache
def openmp_of_torch() -> str | None:
    """The file of the OpenMP runtime that torch runs on; None where that cannot be found out."""

    class Found(ctypes.Structure):
        _fields_ = (
            ("file", ctypes.c_char_p),
            ("at", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("it", ctypes.c_void_p),
        )

    found = Found()
    try:
        start = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # of a library that this one needs, as the loader searches
        if ctypes.CDLL(None).dladdr(start, ctypes.byref(found)) == 0:
            return None
    except (OSError, AttributeError):
        return None
    path = os.fsdecode(found.file)
    return path if Path(path).is_file() else None


# --- on disk --------------------------------------------------------------------------------------------


def _files(code: Path) -> list[Path]:
    return [code] if code.is_file() else sorted(each for each in code.iterdir() if each.is_file())


def _digest(compiler: Sequence[str], flags: Sequence[str], abi: int, code: Path) -> str:
    """Of everything that decides about the library."""
    found = hashlib.sha256()
    for source in _files(code):
        content = source.read_bytes()
        found.update(f"{source.name} {len(content)}\n".encode() + content)
    parts = (FLAGS, tuple(flags), openmp_flags(), _version(tuple(compiler)), abi, _machine())
    found.update(repr(parts).encode())
    return found.hexdigest()[:24]


@functools.cache
def _version(compiler: tuple[str, ...]) -> tuple[tuple[str, ...], str | None, bytes]:
    """What tells a compiler from others, also from what the same path holds after an upgrade.

    Raises:
        BuildError: it cannot be run.
    """
    try:
        told = subprocess.run([*compiler, "--version"], capture_output=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler[0]} cannot be run: {error}") from None
    return compiler, shutil.which(compiler[0]), told


def _machine() -> tuple[object, ...]:
    """A home may be shared by machines that differ in this."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    return sys.platform, platform.machine(), libc


def _open(path: Path, abi: int) -> ctypes.CDLL | None:
    """The library in a file; None where there is none, or not the right one."""
    try:
        content = path.read_bytes()
        if path.stat().st_uid not in (0, os.getuid()) or hashlib.sha256(content[:-32]).digest() != content[-32:]:
            return None
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    if library.mxfp8_abi() == abi:
        return library
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))  # else the same name would mean it for ever
    return None
