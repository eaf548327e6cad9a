"""The kernels in Gluon, which is experimental, with other versions of Triton than the one installed: ``make tritons``
brings them to a folder, where CI has them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
VERSIONS = (HERE / "tritons.txt").read_text().split()
"""The oldest supported and the newest."""
SHARES = 4
"""Of the kernels, of which each version compiles every second one, and the installed one all."""


@pytest.mark.parametrize(("share", "version"), [(i, VERSIONS[i % len(VERSIONS)]) for i in range(SHARES)])
def test_kernels_compile_fit_and_wait_for_what_they_load(share: int, version: str) -> None:
    folder = HERE.parent / ".tritons" / version
    if not folder.is_dir():
        assert "CI" not in os.environ, "make tritons"
        pytest.skip(f"there is no Triton {version}: make tritons")
    path = os.pathsep.join(map(str, (folder, HERE, HERE.parent)))
    command = [sys.executable, HERE / "other_triton.py", f"{share}/{SHARES}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, *kernels = done.stdout.splitlines()
    assert found == version
    assert len(kernels) > 3
