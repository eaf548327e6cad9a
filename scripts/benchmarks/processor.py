"""What decides about speed on a CPU, beside the kernels: its model, its caches, its memory."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SC_LEVEL3_CACHE_SIZE = 194  # of glibc; Python has no name for it


def model() -> str:
    """The name that the CPU gives itself."""
    for key in ("model name", "Model"):
        for line in _lines("/proc/cpuinfo"):
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def caches(folder: Path = CACHES) -> dict[str, int]:
    """Bytes of every cache of the first core but that for instructions, by its level; where a virtual machine and its
    processor disagree, the larger number.
    """
    found: dict[str, int] = {}
    for index in sorted(folder.glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if (index / "type").read_text().strip() != "Instruction":
                size = (index / "size").read_text().strip()
                unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
                found[f"L{(index / 'level').read_text().strip()}"] = int(size.rstrip("KM")) * unit
    if "CS_GNU_LIBC_VERSION" in os.confstr_names:
        with contextlib.suppress(OSError, ValueError):
            found["L3"] = max(found.get("L3", 0), os.sysconf(_SC_LEVEL3_CACHE_SIZE))
    return {name: size for name, size in found.items() if size > 0}


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 4 << 30


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
