"""How the kernels for CPUs are compiled at first use, and what a cache on disk may do wrong."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mxfp8_ops import cache
from mxfp8_ops.cpu import build

COMPILER = next((found for name in build.COMPILERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

ROOT = Path(__file__).parent.parent
ANSWER = 'extern "C" int mxfp8_abi(void) { return 1; }\nextern "C" int answer(void) { return ANSWER; }\n'
COUNTING = """#!/bin/sh
case "$*" in *--version*) echo "{version}"; exit;; esac
echo run >> {folder}/runs
sleep {seconds}
exec {compiler} "$@"
"""


class Setup:
    """Small sources, a compiler that counts its runs, and an empty cache."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.source = folder / "csrc" / "answer.cpp"
        self.source.parent.mkdir()
        self.answers(42)
        self.write_compiler()
        monkeypatch.setattr(build, "SOURCES", self.source.parent)
        monkeypatch.setattr(build, "FLAGS", ("-shared", "-fPIC"))
        monkeypatch.setenv("CXX", str(folder / "compiler"))
        monkeypatch.setenv("MXFP8_CACHE_DIR", str(self.cache))
        (folder / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))

    def answers(self, value: int) -> None:
        self.source.write_text(ANSWER.replace("ANSWER", str(value)))

    def write_compiler(self, version: str = "1", seconds: float = 0, compiler: str | None = COMPILER) -> None:
        path = self.folder / "compiler"
        path.write_text(COUNTING.format(version=version, folder=self.folder, seconds=seconds, compiler=compiler))
        path.chmod(0o755)
        build._version.cache_clear()

    @property
    def runs(self) -> int:
        runs = self.folder / "runs"
        return len(runs.read_text().splitlines()) if runs.exists() else 0

    @property
    def files(self) -> list[Path]:
        return sorted((self.cache / "kernels").glob("*.so"))


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(tmp_path, monkeypatch)


def answer(abi: int = 1, flags: tuple[str, ...] = ()) -> int:
    return build.load("level", flags, abi).answer()


# --- when it is compiled, and when not -----------------------------------------------------------------------


def test_what_is_compiled_once_is_found_again(setup: Setup) -> None:
    assert [answer(), answer()] == [42, 42]
    assert setup.runs == 1
    [path] = setup.files
    assert path.name.startswith("level-")
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, "lock"]  # and nothing unfinished
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_changed_source_is_never_answered_by_an_old_library(setup: Setup) -> None:
    assert answer() == 42
    setup.answers(43)
    assert answer() == 43
    (setup.source.parent / "more.h").write_text("")  # could be included
    assert answer() == 43
    assert (setup.runs, len(setup.files)) == (3, 3)


@pytest.mark.parametrize("change", ["flags", "compiler", "machine", "openmp"])
def test_another_way_to_compile_is_another_library(setup: Setup, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    answer()
    if change == "compiler":
        setup.write_compiler(version="2")
    elif change == "machine":
        monkeypatch.setattr(build.platform, "machine", lambda: "another")
    elif change == "openmp":
        monkeypatch.setattr(build, "openmp_of_torch", lambda: None)
    assert answer(flags=("-O1",) if change == "flags" else ()) == 42
    assert (setup.runs, len(setup.files)) == (2, 2)


@pytest.mark.parametrize(
    "spoil", [lambda content: content[: len(content) // 2], lambda content: b"", lambda _: b"x" * 99]
)
def test_a_file_that_is_not_whole_is_compiled_again(setup: Setup, spoil) -> None:
    in_processes(1)
    [path] = setup.files
    path.write_bytes(spoil(path.read_bytes()))
    assert build._open(path, 1) is None
    answer()
    assert setup.runs == 2
    assert setup.files == [path]


def test_a_library_of_another_abi_is_compiled_again(setup: Setup) -> None:
    stale = sealed(setup.source.read_text().replace("return 1", "return 3"), setup.folder)
    in_processes(1)
    [path] = setup.files
    path.write_bytes(stale)
    assert answer() == 42
    assert setup.runs == 2
    assert path.read_bytes() != stale


def test_a_library_that_cannot_be_loaded_is_compiled_once_a_folder(setup: Setup) -> None:
    with pytest.raises(build.BuildError, match=r"level-\w+\.so is compiled, and cannot be loaded"):
        answer(abi=2)  # of which the source knows nothing; or a file system is mounted without exec
    assert setup.runs == len([*cache.private_folders("kernels")]) == 3


def sealed(source: str, folder: Path) -> bytes:
    """A library as it lies in the cache."""
    (folder / "other.cpp").write_text(source)
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "other.cpp", "-o", "other.so"], cwd=folder, check=True)
    content = (folder / "other.so").read_bytes()
    return content + hashlib.sha256(content).digest()


# --- several processes -------------------------------------------------------------------------------------------


def in_processes(count: int) -> list[int]:
    with multiprocessing.get_context("fork").Pool(count) as pool:
        return pool.map(answer_of, range(count), chunksize=1)


def answer_of(process: int) -> int:
    return answer()


def test_eight_processes_at_once_compile_one_library(setup: Setup) -> None:
    setup.write_compiler(seconds=0.5)
    assert in_processes(8) == [42] * 8
    assert (setup.runs, len(setup.files)) == (1, 1)


def test_eight_processes_that_cannot_lock_race_and_are_all_right(setup: Setup, monkeypatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0)
    assert in_processes(8) == [42] * 8
    assert 1 <= setup.runs <= 8
    assert len(setup.files) == 1
    assert not list((setup.cache / "kernels").glob("*.unfinished"))


def test_a_process_that_was_stopped_does_not_stop_others(setup: Setup, monkeypatch) -> None:
    import fcntl

    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    (setup.cache / "kernels").mkdir(parents=True, mode=0o700)
    with (setup.cache / "kernels" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert answer() == 42


# --- where it is kept --------------------------------------------------------------------------------------------


def no_home(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXFP8_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")


def unknown_home(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MXFP8_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))


def a_file(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.cache.write_text("")


def read_only(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkstemp(dir: Path, suffix: str) -> tuple[int, str]:  # root can write everywhere else
        if setup.cache in dir.parents:
            raise PermissionError(13, "Permission denied", str(dir))
        return original(dir=dir, suffix=suffix)

    original = tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


def writable_by_others(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    (setup.cache / "kernels").mkdir(parents=True)
    (setup.cache / "kernels").chmod(0o777)


def of_another_user(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder to another user")
    (setup.cache / "kernels").mkdir(parents=True, mode=0o700)
    os.chown(setup.cache / "kernels", 12345, 12345)


def a_link(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    (setup.folder / "elsewhere").mkdir(mode=0o700)
    setup.cache.mkdir()
    (setup.cache / "kernels").symlink_to(setup.folder / "elsewhere")


@pytest.mark.parametrize(
    "obstacle", [no_home, unknown_home, a_file, read_only, writable_by_others, of_another_user, a_link]
)
def test_without_a_private_cache_a_private_temporary_folder_is_taken(setup: Setup, monkeypatch, obstacle) -> None:
    obstacle(setup, monkeypatch)
    assert [answer(), answer()] == [42, 42]
    assert setup.runs == 1
    folder = setup.folder / "tmp" / f"mxfp8_ops-{os.getuid()}-kernels"
    assert len(list(folder.glob("level-*.so"))) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not setup.files


def test_a_temporary_folder_that_others_can_write_is_not_used_either(setup: Setup, monkeypatch) -> None:
    a_file(setup, monkeypatch)
    taken = setup.folder / "tmp" / f"mxfp8_ops-{os.getuid()}-kernels"
    taken.mkdir()
    taken.chmod(0o777)
    cache._own_folder.cache_clear()
    try:
        assert [answer(), answer()] == [42, 42]
        assert cache._own_folder().stat().st_mode & 0o777 == 0o700
    finally:
        cache._own_folder.cache_clear()
    assert setup.runs == 1
    assert not list(taken.iterdir())


def test_where_nothing_can_be_written_it_says_so(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    a_file(setup, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    cache._own_folder.cache_clear()
    with pytest.raises(build.BuildError, match=r"^no folder for them can be written$"):
        answer()


# --- without a compiler that works -------------------------------------------------------------------------------


def test_a_compiler_that_fails_is_quoted_in_one_line(setup: Setup) -> None:
    setup.source.write_text("int half(;\n")
    with pytest.raises(
        build.BuildError, match=r"^[^\n]*compiler failed: [^\n]*answer.cpp:1:\d+: error: [^\n]*$"
    ) as told:
        answer()
    assert len(str(told.value)) < 500
    assert not setup.files
    assert not list((setup.cache / "kernels").glob("*.unfinished"))


def test_a_missing_compiler_is_named(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(build.BuildError, match=r"^CXX names 'no-such-compiler', which is no program$"):
        answer()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=r"^there is no C\+\+ compiler: install g\+\+, or name one in CXX$"):
        answer()


def test_a_compiler_that_cannot_be_run_and_one_that_hangs_are_named(setup: Setup, monkeypatch) -> None:
    monkeypatch.setattr(build, "SECONDS", 0.2)
    setup.write_compiler(seconds=5)
    with pytest.raises(build.BuildError, match=r"compiler takes more than 0 s$"):
        answer()
    (setup.folder / "compiler").write_text("not a program")
    build._version.cache_clear()
    with pytest.raises(build.BuildError, match="compiler cannot be run: "):
        answer()


def test_cxx_may_hold_arguments(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.source.write_text(setup.source.read_text().replace("42", "GIVEN"))
    monkeypatch.setenv("CXX", f"{setup.folder / 'compiler'} -DGIVEN=7")
    assert answer() == 7


# --- OpenMP and what is installed --------------------------------------------------------------------------------


def test_the_library_runs_on_the_openmp_of_torch(setup: Setup) -> None:
    torchs = build.openmp_of_torch()
    if torchs is None:
        pytest.skip("this torch does not say which OpenMP it runs on")
    setup.source.write_text(
        '#include <omp.h>\nextern "C" int mxfp8_abi(void) { return 1; }\n'
        'extern "C" int answer(void) { return omp_get_max_threads(); }\n'
        'extern "C" void* place(void) { return reinterpret_cast<void*>(&omp_get_max_threads); }\n'
    )
    library = build.load("level", (), 1)
    library.place.restype = ctypes.c_void_p
    assert library.answer() >= 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= library.place() < end:
            assert line.split()[-1] == os.path.realpath(torchs)


def test_without_torchs_openmp_the_compilers_own_is_taken(setup: Setup, monkeypatch) -> None:
    monkeypatch.setattr(build, "openmp_of_torch", lambda: "/proc/nowhere/libgomp.so")
    assert answer() == 42
    assert setup.runs == 2


def test_the_sources_are_installed(tmp_path: Path) -> None:
    """As a wheel has them, without the compiler that a build step would need."""
    for name in ("mxfp8_ops", "lowering", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-c", "import setuptools.build_meta as build; build.build_wheel('dist')"]
    (tmp_path / "dist").mkdir()
    environment = os.environ | {"CXX": "/proc/nowhere", "CC": "/proc/nowhere"}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment, timeout=120)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    installed = tmp_path / "installed" / "mxfp8_ops" / "cpu" / "csrc"
    sources = sorted(each.name for each in build.SOURCES.iterdir())
    assert sorted(each.name for each in installed.iterdir()) == sources
    assert any(name.endswith(".cpp") for name in sources)
