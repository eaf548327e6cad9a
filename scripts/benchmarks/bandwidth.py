"""Bytes that kernels read from the device's memory, and how fast, as Nsight Compute counts them."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import tools
from .devices import Device
from .options import BANDWIDTH_ROWS, Options, Record, Records, Shape

CALLS = ("linear_packed", "linear")
"""As ``profiled`` makes them, each after R."""
READ = "read_kernel"
SECONDS = 400

BYTES = "dram__bytes_read.sum"
TIME = "gpu__time_duration.sum"
PERCENT = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
UNITS = {
    "byte": 1.0,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
    **dict.fromkeys(("ns", "nsecond"), 1e-3),
    **dict.fromkeys(("us", "usecond"), 1.0),
    **dict.fromkeys(("ms", "msecond"), 1e3),
    **dict.fromkeys(("s", "second"), 1e6),
    "%": 1.0,
}
"""To bytes, microseconds, percent."""
ARGUMENTS = [
    *("--csv", "--page", "raw", "--metrics", ",".join((BYTES, TIME, PERCENT))),
    *("--target-processes", "all", "--profile-from-start", "off"),
    *("--cache-control", "all", "--clock-control", "none"),
]
"""Caches are empty before every kernel, and clocks as they are in use."""


def bandwidth(device: Device, options: Options) -> Records:
    """One record for each shape and number of rows; or one that says why there are none."""
    ncu = tools.find("ncu")
    if ncu is None:
        yield {"skipped": f"there is no ncu on PATH or in {tools.TOOLKIT}"}
        return
    device.release()
    shapes = [f"{n}x{k}" for n, k in options.shapes]
    worker = [sys.executable, "-m", "benchmarks.profiled", options.dtype, *shapes]
    finished = tools.run([ncu, *ARGUMENTS, *worker], SECONDS, _environment())
    try:
        yield from records(finished.output, options.shapes)
    except ValueError as error:
        yield {"skipped": str(error)}


def _environment() -> dict[str, str]:
    scripts = str(Path(__file__).parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (scripts, os.environ.get("PYTHONPATH"))))}


def records(output: str, shapes: Sequence[Shape]) -> list[Record]:
    """From what ncu wrote.

    Raises:
        ValueError: it did not profile every call.
    """
    groups: list[list[Record]] = []
    for kernel in kernels(output):
        if kernel["kernel"].startswith(READ):
            groups.append([])
        if groups:
            groups[-1].append(kernel)
    problems = [(n, k, m) for n, k in shapes for m in BANDWIDTH_ROWS]
    if len(groups) != len(problems) * len(CALLS) or any(len(group) < 2 for group in groups):
        said = [line for line in output.splitlines() if line.startswith("==ERROR==")] or output.splitlines()[-1:]
        raise ValueError(f"ncu profiled {len(groups)} of {len(problems) * len(CALLS)} calls ({''.join(said[:1])})")
    found = []
    for (n, k, m), i in zip(problems, range(0, len(groups), len(CALLS)), strict=True):
        calls = {name: group[1:] for name, group in zip(CALLS, groups[i:], strict=False)}
        found.append({"n": n, "k": k, "m": m, "calls": {"R": groups[i][:1], **calls}})
    return found


def kernels(output: str) -> list[Record]:
    """Every kernel in ncu's table: a line of names, one of units, then one for each launch."""
    lines = [*csv.reader(line for line in output.splitlines() if line.startswith('"'))]
    if len(lines) < 3:
        return []
    names, units, *rows = lines
    unit = dict(zip(names, units, strict=True))
    return [_kernel(dict(zip(names, row, strict=True)), unit) for row in rows]


def _kernel(row: dict[str, str], unit: dict[str, str]) -> Record:
    read, us, percent = (_number(row, unit, name) for name in (BYTES, TIME, PERCENT))
    return {
        "kernel": row["Kernel Name"],
        "us": round(us, 3),
        "bytes": round(read),
        "gbs": round(read / us / 1e3, 1),
        "percent": round(percent, 2),
    }


def _number(row: dict[str, str], unit: dict[str, str], name: str) -> float:
    if unit.get(name) not in UNITS:
        raise ValueError(f"ncu gives {name} in the unit {unit.get(name)!r}")
    return float(row[name].replace(",", "")) * UNITS[unit[name]]
