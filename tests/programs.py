"""The programs under scripts/ as modules."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@contextlib.contextmanager
def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """One of them, imported and forgotten afterwards, together with its rooms. Standard output is no terminal."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    try:
        yield importlib.import_module(name)
    finally:
        for each in [each for each in sys.modules if each == name or each.partition(".")[0] == "benchmarks"]:
            del sys.modules[each]
