"""Every test starts alike: no flag, no compiled graph, the lowering off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lowering
from mxfp8_ops import settings


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in settings.DEQUANT_AT_LOAD:
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    lowering.disable()
    torch._dynamo.reset()
