"""One step as torch's profiler sees it: which kernels run, for how long, and what lies between them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .options import Record

TOP = 12
"""Kernels that are shown."""
LARGE = 1 << 20
"""Bytes from which a copy counts as one of a weight."""
BYTES_PER_THREAD = 16
"""What a thread of a kernel that copies is taken to write; the profiler knows bytes of memcpy only."""
KERNEL, COPY, FILL = "kernel", "gpu_memcpy", "gpu_memset"

_COPIES = re.compile(r"copy|clone", re.IGNORECASE)
_TEMPLATE = re.compile(r"<.*|\(.*")


def profiled(step: Callable[[], object], folder: Path) -> Record:
    """Of one call of ``step``, which has run before."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):
        step()  # the profiler's own start, which takes long
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    path = folder / "trace.json"
    profile.export_chrome_trace(str(path))
    return summary(json.loads(path.read_text())["traceEvents"])


def summary(events: Iterable[Mapping[str, Any]]) -> Record:
    """Of the events of a trace in Chrome's format: times in microseconds."""
    found = [each for each in events if each.get("ph") == "X" and each.get("cat") in (KERNEL, COPY, FILL)]
    kernels: dict[str, Record] = {}
    for each in found:
        row = kernels.setdefault(name_of(each["name"]), {"count": 0, "us": 0.0})
        row["count"] += 1
        row["us"] += each["dur"]
    busy, span = occupied(found)
    top = sorted(kernels.items(), key=lambda item: -item[1]["us"])
    return {
        "kernels": len(found),
        "us": round(sum(each["dur"] for each in found), 2),
        "span": round(span, 2),
        "gaps": round(span - busy, 2),
        "copies": sum(map(is_large_copy, found)),
        "top": [{"name": name, "count": row["count"], "us": round(row["us"], 2)} for name, row in top[:TOP]],
    }


def occupied(events: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Time in which at least one of the events runs, and from the first one's start to the last one's end."""
    busy, first, end = 0.0, None, 0.0
    for start, length in sorted((each["ts"], each["dur"]) for each in events):
        if first is None:
            first = end = start
        busy += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    return busy, end - (first or 0.0)


def is_large_copy(event: Mapping[str, Any]) -> bool:
    """Whether it copies as much as a weight, or as much of a KV cache, as far as a trace tells."""
    arguments = event.get("args", {})
    if event["cat"] == COPY:
        return int(arguments.get("bytes", 0)) > LARGE
    threads = 1
    for size in (*arguments.get("grid", ()), *arguments.get("block", ())):
        threads *= size
    return event["cat"] == KERNEL and bool(_COPIES.search(event["name"])) and threads * BYTES_PER_THREAD > LARGE


def name_of(kernel: str) -> str:
    """Without what templates make long."""
    text = kernel.removeprefix("void ")
    if text.startswith(("Memcpy", "Memset")):
        return text
    return _TEMPLATE.sub("", text)[:80]
