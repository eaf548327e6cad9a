"""Every CPU kernel under the compiler's sanitizers for addresses and undefined behaviour. The problems are small, and
their results are compared with the reference.

Exit status: 0; 1 where a sanitizer found errors; 2 for a bad argument, or where there is no compiler or no sanitizer;
3 where nothing was found, but the worker did not come to an end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tools

from mxfp8_ops.cpu import build, library

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RUNTIMES = ("libasan.so", "libstdc++.so")
"""To be loaded before anything else; the second one because the first looks for it when it starts."""
FOUND = ("ERROR: AddressSanitizer", "runtime error: ")
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # Python leaks when it ends
LINES = 16
"""Of a report that are shown."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.worker:
        return work(args.small, args.sources)
    try:
        preloaded = runtimes()
    except build.BuildError as error:
        print(f"sanitize-cpu: {error}", file=sys.stderr)
        return 2
    statuses = [check(level, args, preloaded) for level in args.levels]
    return 1 if 1 in statuses else max(statuses)


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(
        prog="sanitize_cpu.py", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    levels = library.supported()
    new.add_argument("--levels", nargs="+", default=levels, choices=levels, help="default: all that this CPU can run")
    new.add_argument("--small", action="store_true", help="few cases, in seconds")
    new.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for each level; default: 600")
    new.add_argument("--sources", type=Path, metavar="FOLDER", help="of other kernels")
    new.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return new


def runtimes() -> list[str]:
    """Files of the sanitizers.

    Raises:
        BuildError: there are none.
    """
    compiler = build.find_compiler()
    found = []
    for name in RUNTIMES:
        told = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        path = Path(told.stdout.strip())
        if not path.is_absolute():
            raise build.BuildError(f"{compiler[0]} has no {name}")
        found.append(str(path.resolve()))
    return found


def check(level: str, args: argparse.Namespace, preloaded: Sequence[str]) -> int:
    """The status of one level, which is printed, with a report where there is one."""
    words = ["--worker", *(["--small"] if args.small else [])]
    words += [] if args.sources is None else ["--sources", str(args.sources)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MXFP8_")}
    kept |= {name: value for name, value in os.environ.items() if name == "MXFP8_CACHE_DIR"}
    variables = kept | OPTIONS | {"MXFP8_CPU_LEVEL": level, "LD_PRELOAD": ":".join(preloaded)}
    done = tools.run([sys.executable, __file__, *words], args.limit, variables)
    lines = done.output.splitlines()
    errors = next((i for i, line in enumerate(lines) if any(each in line for each in FOUND)), None)
    status = 1 if errors is not None else 0 if done.status == 0 else 3
    verdict = ("clean", "errors", "", "out of time" if done.status is None else "worker failed")[status]
    print(f"{level:<12} {verdict:<14} {lines[-1] if status == 0 else ''} {done.seconds:.0f} s", flush=True)
    if status:
        first = 0 if errors is None else max(0, errors - 2)
        print(*(lines[first:] if errors is not None else lines[-LINES:])[:LINES], sep="\n", flush=True)
    return status


def work(small: bool, sources: Path | None) -> int:
    """Compiles the kernels of the level in force with the sanitizers, and runs every case."""
    from benchmarks.case import run_all
    from benchmarks.cpu_cases import cases

    os.environ.pop("LD_PRELOAD", None)  # the compiler needs none of that
    build.FLAGS = (*build.FLAGS, *FLAGS)
    build.SOURCES = sources or build.SOURCES
    warnings.filterwarnings("error", message="MXFP8 runs on the slow reference")
    print(f"{run_all(cases(small))} cases are right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
