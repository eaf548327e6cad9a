"""Every test starts alike: no flag, no compiled graph, the lowering off; every session with an empty cache."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch

import lowering
from mxfp8_ops import environment

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the process that starts them
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="mxfp8-tests-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    lowering.disable()
    torch._dynamo.reset()
