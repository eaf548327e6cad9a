"""The command-line tools of the CUDA toolkit: where they are, and running them with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOOLKIT = "/usr/local/cuda/bin"


@dataclass(frozen=True)
class Finished:
    """What a program wrote, its exit status (None: it ran out of time and was killed), and how long it took."""

    output: str
    status: int | None
    seconds: float


def find(name: str) -> str | None:
    """The path of a tool that is on ``PATH`` or where the toolkit is installed; None where there is none."""
    return shutil.which(name) or shutil.which(name, path=TOOLKIT)


def run(command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> Finished:
    """Runs a program for ``limit`` seconds at most; both of its streams make up its output."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as any child of a killed tool
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the program that the tool has started
                process.wait()
        output.seek(0)
        return Finished(output.read().decode(errors="replace"), status, time.monotonic() - started)
