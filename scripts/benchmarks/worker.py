"""One process of ``scripts/bench_model.py``: ``python -m benchmarks.worker ROOM OPTIONS ARGUMENTS RESULTS``.

Every record is written when it is there, with the seconds since the process began, before torch was imported.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import importlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from .model_options import ModelOptions  # noqa: E402


def main(room: str, options: str, arguments: str, results: str) -> None:
    import torch

    records = importlib.import_module(f"benchmarks.{room}").records
    with Path(results).open("a") as file, torch.no_grad():
        for section, record in records(ModelOptions.of(json.loads(options)), **json.loads(arguments)):
            timed = record | {"seconds": round(time.monotonic() - STARTED, 2)}
            print(json.dumps([section, timed]), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
