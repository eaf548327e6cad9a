"""Fixtures of tests of the plug-in for transformers. Only where that can be imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers

from mxfp8_ops import environment
from mxfp8_ops.transformers import give_back


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars; and transformers reads checkpoints itself again afterwards."""
    transformers.utils.logging.disable_progress_bar()
    yield
    give_back()


@pytest.fixture
def reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels add up in an order of their own: without them, equal weights give equal bits."""
    monkeypatch.setenv(environment.KERNELS, "off")
