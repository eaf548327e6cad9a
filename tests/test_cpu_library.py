"""Which instruction set the kernels for CPUs are compiled for, who says so, and what happens where there are none."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import all_codes, assert_same

from mxfp8_ops import cpu, reference
from mxfp8_ops.cpu import build, library

ROOT = Path(__file__).parent.parent
VARIABLE = "MXFP8_CPU_LEVEL"
COMPILES = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been loaded yet."""
    monkeypatch.setattr(library, "_current", {})
    monkeypatch.setattr(library, "_loaded", {})


def test_levels_need_ever_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(library.LEVELS) == ["amx_bf16", "avx512_bf16", "avx512", "avx2", "generic"]
    levels = list(library.LEVELS.values())
    for better, worse in itertools.pairwise(levels):
        assert set(better.features) > set(worse.features)
    assert {"-mavx512bf16", "-mamx-bf16"} < set(levels[0].flags)
    assert levels[-1].flags == ()


# --- what this machine can run -------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Another one: its architecture, and what its /proc/cpuinfo says."""
    made = SimpleNamespace(architecture="x86_64", cpuinfo="", tiles=True)

    def read_text(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if made.cpuinfo is None:
            raise FileNotFoundError(path)
        return made.cpuinfo

    monkeypatch.setattr(library.platform, "machine", lambda: made.architecture)
    monkeypatch.setattr(library.Path, "read_text", read_text)
    monkeypatch.setattr(library, "_may_use_tiles", lambda: made.tiles)
    library.cpu_features.cache_clear()
    yield made
    library.cpu_features.cache_clear()


def cpuinfo(*flags: str) -> str:
    """Of one processor for each argument."""
    return "\n".join(f"processor\t: {i}\nflags\t\t: fpu sse2 {each}\nbugs\t\t: avx2\n" for i, each in enumerate(flags))


AVX2 = "avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"


@pytest.mark.parametrize(
    ("text", "best"),
    [
        (cpuinfo(f"{AVX512} avx512vbmi avx512_bf16 amx_tile amx_bf16"), "amx_bf16"),
        (cpuinfo(f"{AVX512} avx512vbmi avx512_bf16 avx512_vnni"), "avx512_bf16"),
        (cpuinfo(f"{AVX512} avx512_bf16"), "avx512"),
        (cpuinfo(AVX512), "avx512"),
        (cpuinfo("avx512f avx512bw avx512vl avx512dq"), "generic"),  # a virtual machine that shows only some
        (cpuinfo(f"{AVX2} avx512f"), "avx2"),
        (cpuinfo(AVX2), "avx2"),
        (cpuinfo("avx2"), "generic"),
        (cpuinfo(AVX512, AVX2), "avx2"),  # processors that differ
        ("", "generic"),
        (None, "generic"),
    ],
)
def test_the_best_level_is_one_whose_every_feature_is_there(machine, text: str | None, best: str) -> None:
    machine.cpuinfo = text
    names = list(library.LEVELS)
    assert library.supported() == tuple(names[names.index(best) :])


def test_matrix_tiles_need_the_permission_of_the_system(machine: SimpleNamespace) -> None:
    machine.cpuinfo, machine.tiles = cpuinfo(f"{AVX512} avx512vbmi avx512_bf16 amx_tile amx_bf16"), False
    assert library.supported()[0] == "avx512_bf16"


def test_other_architectures_have_the_portable_level(machine: SimpleNamespace) -> None:
    machine.architecture, machine.cpuinfo = "aarch64", "processor\t: 0\nFeatures\t: fp asimd avx2 fma f16c\n"
    assert library.supported() == ("generic",)


# --- the variable ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["", "avx", "avx2 ", "sse2", "on"])
def test_a_word_that_is_no_level_is_an_error_at_every_call(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, word)
    expected = f"{VARIABLE} must be one of amx_bf16, avx512_bf16, avx512, avx2, generic, got {word!r}"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            cpu.kernels()


def test_a_level_that_the_cpu_lacks_is_an_error_that_names_those_it_has(machine, forgotten, monkeypatch) -> None:
    machine.cpuinfo = cpuinfo(f"{AVX2} avx512f")
    monkeypatch.setenv(VARIABLE, "avx512")
    expected = (
        f"{VARIABLE} must be one of avx2, generic on this machine, got 'avx512', for which its CPU lacks avx512bw, "
        "avx512vl, avx512dq"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        cpu.kernels()


def test_the_variable_counts_at_the_next_call_in_any_case(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda name: name)
    best = library.supported()[0]
    seen = [library.current()]
    for word in ("generic", "Generic", best.upper(), None):
        monkeypatch.delenv(VARIABLE, raising=False)
        if word is not None:
            monkeypatch.setenv(VARIABLE, word)
        seen.append(library.current())
    assert seen == [best, "generic", "generic", best, best]


@COMPILES
@pytest.mark.parametrize("name", library.LEVELS)
def test_every_level_that_the_machine_can_run_gives_the_bits_of_the_reference(name: str, monkeypatch) -> None:
    if name not in library.supported():
        pytest.skip(f"this CPU lacks {set(library.LEVELS[name].features) - library.cpu_features()}")
    monkeypatch.setenv(VARIABLE, name)
    kernels = cpu.kernels()
    assert kernels is not None
    assert library.current() is library.load(name)
    weight, scale = all_codes()
    assert_same(kernels.dequant(weight, scale, torch.float32), reference.dequant(weight, scale, torch.float32))


# --- loading ---------------------------------------------------------------------------------------------------


def fake_build(monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...] = ()) -> list[str]:
    """In place of building something that only knows what was asked for. Gives the names of levels, in order."""
    asked: list[str] = []

    def load(name: str, flags: tuple[str, ...], abi: int) -> SimpleNamespace:
        asked.append(name)
        if name in broken:
            raise build.BuildError(f"g++ does not know {flags}")
        return SimpleNamespace(name=name, **{each: SimpleNamespace() for each in library.FUNCTIONS})

    monkeypatch.setattr(build, "load", load)
    return asked


def test_threads_load_a_level_once(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_build(monkeypatch)
    together = threading.Barrier(8)

    def call(_: int) -> object:
        together.wait()
        return library.current()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(8)))
    assert asked == [library.supported()[0]]
    assert all(each is found[0] for each in found)


def test_every_function_has_its_types(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_build(monkeypatch)
    loaded = library.load("generic")
    for name, (result, arguments) in library.FUNCTIONS.items():
        assert (getattr(loaded, name).restype, getattr(loaded, name).argtypes) == (result, arguments)


def test_a_compiler_too_old_for_the_best_level_compiles_the_next(forgotten: None, monkeypatch) -> None:
    monkeypatch.setattr(library, "supported", lambda: ("avx2", "generic"))
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset(library.LEVELS["avx2"].features))
    asked = fake_build(monkeypatch, broken=("avx2",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [cpu.kernels(), cpu.kernels()] == [cpu.dispatch] * 2
    assert asked == ["avx2", "generic"]


def test_without_kernels_there_is_one_warning(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_build(monkeypatch, broken=tuple(library.LEVELS))
    with pytest.warns(
        UserWarning, match="^MXFP8 runs on the slow reference: its kernels for CPUs cannot be built"
    ) as caught:
        found = [cpu.kernels() for _ in range(3)]
    assert found == [None] * 3
    assert len(caught) == 1
    assert asked == list(library.supported())  # each once


# --- processes ---------------------------------------------------------------------------------------------------


def run(program: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_builds_nothing(tmp_path: Path) -> None:
    run("import mxfp8_ops.cpu", MXFP8_CACHE_DIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_operators_warn_once_and_the_reference_answers(compiler: str, tmp_path: Path) -> None:
    """The second one is there and fails at everything."""
    program = """
import warnings, torch, mxfp8_ops
from mxfp8_ops import ops, reference
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(3, 64)
    pair = mxfp8_ops.quantize(x)
    assert torch.equal(mxfp8_ops.linear(x, *pair), reference.linear(x, *pair))
    assert torch.equal(mxfp8_ops.dequant(*pair), reference.dequant(*pair))
    print(ops.kernel_name("linear", x.device), *(each.message for each in caught), sep="\\n")
"""
    name, *warned = run(program, CXX=compiler, MXFP8_CACHE_DIR=str(tmp_path)).splitlines()
    assert name == "reference"
    assert len(warned) == 1
    assert warned[0].startswith("MXFP8 runs on the slow reference: its kernels for CPUs cannot be built (")
    assert not list(tmp_path.rglob("*.so"))


@COMPILES
def test_a_forked_process_computes_with_threads_after_its_parent_has() -> None:
    """Torch's own operators would wait there for ever, for threads that only the parent has."""
    program = """
import os, signal, torch
from mxfp8_ops import cpu
torch.set_num_threads(2)
weight, scale = torch.ones(64, 4096).to(torch.float8_e4m3fn), torch.full((64, 128), 128, dtype=torch.uint8)
compute = lambda: cpu.kernels().dequant(weight, scale, torch.float32).unique().tolist()
assert compute() == [2]
for _ in range(2):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        assert compute() == [2] and torch.arange(1e6).exp().isinf().any()
        print(len(os.listdir("/proc/self/task")), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert compute() == [2]
"""
    assert run(program).split() == ["2", "2"]
