"""What a run measures, and what a stored run looks like."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, int]
Record: TypeAlias = dict[str, Any]
Records: TypeAlias = Generator[Record, None, None]

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672), (1024, 4096))
ROWS = tuple(1 << i for i in range(14))
QUICK_SHAPES = ((4096, 4096), (28672, 8192))
QUICK_ROWS = (1, 4, 16, 64, 256, 2048)
EMULATED_ROWS = (1, 64, 1024)
"""Rows of x for which the emulation is measured: it is slow, and every one of them is a compile."""
HOST_SHAPE = (1024, 4096)

CPU_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
CPU_ROWS = (1, 4, 16, 64, 256, 1024)
CPU_QUICK_SHAPES = CPU_SHAPES[:1]
CPU_QUICK_ROWS = CPU_ROWS[:-1]
CPU_SECTIONS = ("elementwise", "linear")

SECTIONS = ("elementwise", "linear", "host", "cliffs", "sustained", "bandwidth")
QUICK_SECTIONS = SECTIONS[:-2]
BANDWIDTH_ROWS = (1, 16)
SUSTAINED_ROWS = (1024, 4096)
"""Rows of x that take the matrix units to their limits."""
DEVICES = ("cuda", "cpu")
DTYPES = ("bfloat16", "float16")
CPU_DTYPES = (*DTYPES, "float32")

DEFAULTS = {False: (SHAPES, ROWS, SECTIONS), True: (QUICK_SHAPES, QUICK_ROWS, QUICK_SECTIONS)}
CPU_DEFAULTS = {
    False: (CPU_SHAPES, CPU_ROWS, CPU_SECTIONS),
    True: (CPU_QUICK_SHAPES, CPU_QUICK_ROWS, CPU_SECTIONS),
}
"""Shapes, rows and sections, by whether the run is to be quick."""

FILES = ("--json", "--markdown", "--plot", "--from-json")
"""Arguments that name one."""

FORMAT = 1


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shapes: ``(N, K)`` of the weights.
        rows: of x, M.
        emulated: those of ``rows`` for which the emulation is measured.
        replays: timed rounds, of which the median counts.
        cliff_rows: the M of the section ``cliffs``, which is measured on the first shape.
    """

    shapes: Sequence[Shape] = SHAPES
    rows: Sequence[int] = ROWS
    dtype: str = "bfloat16"
    sections: Sequence[str] = SECTIONS
    emulated: Sequence[int] = EMULATED_ROWS
    replays: int = 11
    cliff_rows: Sequence[int] = tuple(range(1, 301))


class Run:
    """A run as data: where it was made, what it measured, and the records of every section.

    With a path, every record is stored as soon as it is there, so that a killed run loses nothing.
    """

    def __init__(self, environment: Record, options: Any, path: Path | None = None) -> None:
        """``options`` is a dataclass whose ``sections`` are names."""
        self.path = path
        self.data: Record = {
            "format": FORMAT,
            "environment": environment,
            "options": asdict(options),
            "sections": {name: [] for name in options.sections},
        }
        self._store()

    def add(self, section: str, record: Record) -> None:
        self.data["sections"][section].append(record)
        self._store()

    def _store(self) -> None:
        if self.path is not None:
            store(self.data, self.path)


def store(run: Record, path: Path) -> None:
    """A run as JSON: the file is as it was before, or complete."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(run, indent=1) + "\n")
    os.replace(unfinished, path)


def shapes_of(records: Iterable[Record]) -> list[Shape]:
    """The shapes of some records, each once, in their order."""
    return list(dict.fromkeys((record["n"], record["k"]) for record in records))


def command(script: str, words: Sequence[str]) -> str:
    """What was typed, with files named without their folders."""
    shown = []
    for word, before in zip(words, ["", *words], strict=False):
        name, equals, value = word.partition("=")
        if before in FILES:
            word = Path(word).name
        elif equals and name in FILES:
            word = f"{name}={Path(value).name}"
        shown.append(word)
    return shlex.join(["python", f"scripts/{script}", *shown])
