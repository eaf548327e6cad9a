"""Every test starts alike: no flag, no compiled graph, the lowering off; every session with empty caches."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else a worker's idle threads spin on the cores of the others
os.environ.setdefault("TORCH_WARM_POOL", "0")  # nor does every process start others that could compile for a device
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # or compile a program to see whether its vectors work

import pytest
import torch

import lowering
from mxfp8_ops import environment

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the process that starts them
    for variable in ("TORCHINDUCTOR_CACHE_DIR", environment.CACHE_DIR):
        os.environ[variable] = tempfile.mkdtemp(prefix="mxfp8-tests-")
        atexit.register(shutil.rmtree, os.environ[variable], ignore_errors=True)


LONGEST = ("test_scripts", "test_scripts_bench_model", "test_aoti", "test_checkpoint_loading", "test_transformers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take a minute come first: in the end they would keep one worker busy, and the others waiting."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def kernels_compiled_once() -> Iterator[None]:
    """Where caches are disabled a graph is made again, but not what was compiled of the same C++ before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.with_fresh_cache_if_config", contextlib.nullcontext, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def imports_outlive_the_session() -> None:
    """So the collector, which many tests call, need not look through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    lowering.disable()
    torch._dynamo.reset()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with copies of the modules in ``targets/``, which can be imported from there."""
    for path in (Path(__file__).parent / "targets").glob("*.py"):
        shutil.copy(path, tmp_path)
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One headless browser for all tests of this process."""
    import pages

    started = pages.start(tmp_path_factory.mktemp("browser"))
    yield started
    started.quit()


@pytest.fixture
def browser(driver: Any, tmp_path: Path) -> Iterator[Any]:
    """A browser to open pages in; every test ends with a look at the console."""
    import pages

    made = pages.Browser(driver, tmp_path)
    made.width(1400)
    made.media()
    yield made
    assert driver.get_log("browser") == []


@pytest.fixture(scope="session")
def compiled() -> list[Any]:
    """Reports on a small model as it is really compiled, with the flag on and off."""
    import pages
    from models import rows

    torch._dynamo.reset()
    with torch.no_grad():
        return [
            lowering.explain(pages.Sample(), rows(), dequant_at_load=flag, title="Sample") for flag in (True, False)
        ]
