"""Processes of ``scripts/bench_model.py``: every one measures in memory and with compilers of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import tools
from .model_options import PEAK_WAYS, TRACED, ModelOptions
from .options import Record

SCRIPTS = Path(__file__).parent.parent
RUNS = ("cold", "warm")


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        room: the module whose ``records`` it runs, with ``arguments``.
        sections: to which its records belong; the first one gets the reason if it fails.
        name: of the job, for people.
        count: how many records there will be.
        environment: variables besides those of this process.
    """

    room: str
    sections: tuple[str, ...]
    name: str
    count: int
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def jobs(options: ModelOptions, folder: Path) -> Iterator[Job]:
    """All processes of a run, in order. They hand on what others need in ``folder``."""
    wanted = options.sections
    if "blocks" in wanted:
        yield Job("blocks", ("blocks",), "blocks", 2 * len(options.rows))
    if "merge" in wanted:
        yield Job("merge", ("merge",), "merge", len(options.merge_rows))
    for variant in options.variants:
        sections = tuple(
            name for name in ("model", "trace") if name in wanted and (name == "model" or variant in TRACED)
        )
        if sections:
            count = ("model" in sections) * len(options.batches) + ("trace" in sections)
            arguments = {"variant": variant, "sections": sections, "folder": str(folder)}
            yield Job("decoding", sections, variant, count, arguments)
    if "start" in wanted:
        caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        for run in RUNS:
            yield Job("start", ("start",), run, 1, {"run": run}, caches)
    if "peak" in wanted:
        for way in PEAK_WAYS:
            yield Job("peak", ("peak",), way, 1, {"way": way})
    if "check" in wanted:
        yield Job("check", ("check",), "check", 1)


def run(job: Job, options: ModelOptions, folder: Path) -> Iterator[tuple[str, Record]]:
    """Runs the process; gives each record with its section, and what went wrong as the last one."""
    results = folder / "results.jsonl"
    results.write_text("")
    words = [job.room, json.dumps(options.data()), json.dumps(job.arguments), str(results)]
    path = os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path} | dict(job.environment)
    finished = tools.run([sys.executable, "-m", "benchmarks.worker", *words], options.limit, environment)
    for line in results.read_text().splitlines():
        section, record = json.loads(line)
        yield section, record
    if finished.status != 0:
        yield job.sections[0], {"failed": reason(finished, options.limit), "job": job.name}


def reason(finished: tools.Finished, limit: float) -> str:
    """Why a process has not come to its end, in one line."""
    if finished.status is None:
        return f"it took more than {limit:.0f} s"
    lines = [line.strip() for line in finished.output.splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [f"exit status {finished.status}"])[-1][:300]
