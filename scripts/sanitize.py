"""Every GPU kernel under compute-sanitizer: accesses out of bounds, races in shared memory, memory that nobody has
written, wrong synchronization. The problems are small, and their results are compared with the reference.

Exit status: 0; 1 where a tool found errors; 2 for a bad argument, or where there is no tool or no device; 3 where
nothing was found, but a tool or the worker did not come to an end.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import options as known
from benchmarks import render, tools
from benchmarks.findings import Finding, judged, page
from benchmarks.tools import Finished

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CHECKS = ["--error-exitcode", "99", "--check-exit-code", "no", "--report-api-errors", "no", "--show-backtrace", "no"]
CHECKS += ["--print-limit", "100000"]
"""Of kernels alone: torch and Triton make API calls that may fail. Whether the worker does, it says itself."""
PATIENCE = ["--launch-timeout", "120"]
"""Seconds until the worker makes its first call, after importing torch."""
WORKER = [sys.executable, str(Path(__file__).resolve()), "--worker"]
ALL = "0/1"
FILL_SECONDS = 400  # for compiling everything


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    if args.worker is not None:
        share, shares = map(int, args.worker.split("/"))
        return work(share, shares, args.only)
    sanitizer = tools.find("compute-sanitizer")
    reason = missing(sanitizer, args.markdown)
    if sanitizer is None or reason is not None:
        print(f"sanitize: {reason}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(args.jobs) as pool:
        only = [] if args.only is None else ["--only", args.only]
        filled = list(pool.map(lambda i: fill([f"{i}/{args.jobs}", *only]), range(args.jobs)))
        failed = next((each for each in filled if each.status != 0), None)
        if failed is not None:
            print(failed.output, "sanitize: the cases fail without a tool, too", sep="\n", file=sys.stderr)
            return 3
        print(f"{max(each.seconds for each in filled):.0f} s to compile", flush=True)
        found = list(pool.map(lambda tool: check(sanitizer, tool, [ALL, *only], args.limit), args.tools))
    for each in found:
        print("  ".join(each.cells()), *each.report, sep="\n")
    if args.markdown is not None:
        args.markdown.write_text(page(found, *header(sanitizer, words)))
    verdicts = {each.verdict for each in found}
    return 1 if "errors" in verdicts else 0 if verdicts == {"clean"} else 3


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(prog="sanitize.py", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    new.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS, help="default: all")
    new.add_argument("--jobs", type=int, default=4, choices=range(1, 17), metavar="N", help="processes at once")
    new.add_argument("--limit", type=float, default=200, metavar="SECONDS", help="for each tool; default: 200")
    new.add_argument("--only", metavar="TEXT", help="cases whose names have it; default: all")
    new.add_argument("--markdown", type=Path, metavar="FILE", help="write the page")
    new.add_argument("--worker", metavar="I/N", help=argparse.SUPPRESS)
    return new


def missing(sanitizer: str | None, markdown: Path | None) -> str | None:
    """Why nothing can be checked here, None if it can."""
    from benchmarks.devices import DEVICES

    if markdown is not None and not markdown.absolute().parent.is_dir():
        return f"{markdown} cannot be written: there is no folder {markdown.parent}"
    if sanitizer is None:
        return f"there is no compute-sanitizer on PATH or in {tools.TOOLKIT}"
    return DEVICES["cuda"].missing()


def work(share: int, shares: int, only: str | None) -> int:
    """Runs every case with a text in its name, or one of several shares of them."""
    from benchmarks.case import run_all
    from benchmarks.cases import cases

    warnings.filterwarnings("error", message="MXFP8 weights are dequantized")  # what it says is not what is checked
    found = [case for case in cases() if only is None or only in case.name]
    if not found:
        print(f"sanitize: no case has {only!r} in its name")
        return 1
    done = run_all(found[share::shares])
    print(f"sanitize: {done} cases are right", flush=True)
    return 0


def fill(words: list[str]) -> Finished:
    """Triton's cache: compilers are slow under a tool."""
    return tools.run([*WORKER, *words], FILL_SECONDS, environment())


def check(sanitizer: str, tool: str, words: list[str], limit: float) -> Finding:
    command = [sanitizer, "--tool", tool, *CHECKS, *PATIENCE, *WORKER, *words]
    return judged(tool, tools.run(command, limit, environment()))


def environment() -> dict[str, str]:
    """Without torch's cache every tensor is an allocation of its own, whose bounds a tool knows. Processes side by side
    have a core each.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MXFP8_")}
    return kept | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}


def header(sanitizer: str, words: Sequence[str]) -> tuple[str, str]:
    """The device, and everything that decides about the result."""
    from benchmarks.devices import DEVICES

    version = re.search(r"Version (\S+)", tools.run([sanitizer, "--version"], 20).output)
    found = DEVICES["cuda"].open().environment() | {"clocks": None, "switches": {}}
    found |= {"date": str(datetime.date.today()), "command": known.command("sanitize.py", words)}
    name = f"compute-sanitizer {version[1]}" if version else "compute-sanitizer"
    return found["device"], f"{name}, {render.header({'environment': found})}"


if __name__ == "__main__":
    sys.exit(main())
