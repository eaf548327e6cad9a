"""How long a process takes until the compiled model answers, with empty caches on disk and with full ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch._dynamo.utils import counters

from . import llama
from .decoding import Decoder
from .model_options import START_LAYERS, ModelOptions
from .options import Record

COUNTED = {
    "fx_hits": ("inductor", "fxgraph_cache_hit"),
    "fx_misses": ("inductor", "fxgraph_cache_miss"),
    "aot_hits": ("aot_autograd", "autograd_cache_hit"),
    "aot_misses": ("aot_autograd", "autograd_cache_miss"),
    "aot_bypasses": ("aot_autograd", "autograd_cache_bypass"),
}


def records(options: ModelOptions, run: str) -> Iterator[tuple[str, Record]]:
    """One record: of which the worker says how long the process took until here."""
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    before = files(folder)
    started = time.monotonic()
    model = llama.build(options, "kept", START_LAYERS)
    built = round(time.monotonic() - started, 2)
    decoder = Decoder.compile(model, options, "kept", options.batches[0])
    counts = {name: int(counters[group][key]) for name, (group, key) in COUNTED.items()}
    new = {"triton_files": files(folder) - before}
    yield "start", {"run": run, "build_s": built, "compile_s": decoder.seconds} | counts | new


def files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*")) if folder.is_dir() else 0
