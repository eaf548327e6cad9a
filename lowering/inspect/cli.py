"""Shows what torch.compile does to the MXFP8 weights of a model, and why.

TARGET is module:factory or file.py[:factory], where the factory takes no arguments and returns (model,
example_inputs), a module or function and a tuple of positional or a dict of keyword arguments; a folder holding
a transformers checkpoint, whose linears are quantized first; a .pt2 exported program; or demo (all-MiniLM-L6-v2).
It is compiled with backend="mxfp8", without gradients and without caches on disk, since a graph that comes from
a cache is not generated again.

Exit status: 0, also when nothing in the model is MXFP8; 1 if --fail-on found something; 2 after an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import mxfp8_ops
from mxfp8_ops import environment

from ..weights import ACTIONS
from . import document, explain, html
from .summary import Report
from .targets import Failure, Target, load, one_line

PROGRAM = "mxfp8-inspect"
FLAG = {"on": True, "off": False, "unset": None}
STAGES = ("dynamo", "aot", "joint", "post-grad", "code")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    """The console command ``mxfp8-inspect``; returns its exit status."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"{PROGRAM}: {error if isinstance(error, Failure) else one_line(error)}", file=sys.stderr)
    return 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked; exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help="module:factory, file.py, checkpoint folder, file.pt2 or demo")
    lists = {
        "dequant_at_load": (tuple(FLAG), "the flag; several are compared; by default what the environment says"),
        "stage": ((*STAGES, "all"), "graphs to print: dynamo (default), the diff, to code, what Inductor generated"),
        "fail_on": (ACTIONS, "exit with 1 if a weight is that, or if there is no MXFP8 weight at all"),
    }
    for name, (words, text) in lists.items():
        add(f"--{name.replace('_', '-')}", nargs="+", default=[], metavar="WORD", help=f"{', '.join(words)}: {text}")
    add("--freezing", action="store_true", help="with Inductor's freezing")
    add("--dynamic", action="store_true", help="with dynamic shapes")
    add("--device", help="where to bring model and inputs, such as cuda")
    add("--dtype", choices=DTYPES, help="of activations and of weights that are not MXFP8")
    add("--weights", metavar="GLOB", help="only weights whose names match, such as '*.mlp.*'")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    add("--html", type=Path, metavar="FILE", help="write everything as one self-contained page")
    add("--context", type=int, default=3, metavar="N", help="unchanged lines around a change (default 3)")
    add("--no-pager", action="store_true", help="never page the output")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"{PROGRAM} {mxfp8_ops.__version__}, torch {torch.__version__}")
    args = parser.parse_args(argv)
    for name, (words, _) in lists.items():
        values = getattr(args, name)
        if args.target is None and values and values[-1] not in words:
            args.target = values.pop()  # options before the target: the last list has swallowed it
        for value in values:
            if value not in words:
                parser.error(f"--{name.replace('_', '-')}: {value!r} is none of {', '.join(words)}")
        setattr(args, name, list(dict.fromkeys(values)))
    if args.target is None:
        parser.error("there is no TARGET")
    if args.context < 0:
        parser.error(f"--context must be 0 or more, got {args.context}")
    return args


def run(args: argparse.Namespace) -> int:
    """Inspects, prints and writes; returns the exit status.

    Raises:
        Failure: something the user can put right. Whatever else compiling the model raises.
    """
    try:
        from . import terminal
    except ImportError as error:
        raise Failure(f"needs the package rich: pip install 'mxfp8-ops[inspect]' ({error})") from error
    for path in filter(None, (args.json, args.html)):
        check_writable(path)
    start = time.perf_counter()
    with progress() as step:
        step(f"loading {args.target}")
        target = load(args.target, args.device, DTYPES.get(args.dtype))
        loaded = time.perf_counter()
        reports = [inspected(target, word, args, step) for word in args.dequant_at_load or (None,)]
        compiled = time.perf_counter()
        step("writing the report")
        reports = reduced(reports, args.weights)
        stages = STAGES if "all" in args.stage else args.stage or ["dynamo"]
        on = terminal.console()
        text = terminal.render(reports, on, stages, args.context, target.notes)
        for path, write in ((args.json, document.to_json), (args.html, html.page)):
            if path is not None:
                path.write_text(write(reports), encoding="utf-8")
    parts = (loaded - start, compiled - loaded, time.perf_counter() - compiled)
    text += "".join(f"\nwrote {path}" for path in (args.json, args.html) if path is not None)
    text += "\ntime: {:.2f} s to load the target, {:.2f} s to compile, {:.2f} s to report\n".format(*parts)
    terminal.show(text, on, not args.no_pager)
    return failed(reports, args.fail_on)


def check_writable(path: Path) -> None:
    """Raises Failure, before anything takes time, if a file cannot be written."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise Failure(f"cannot write {str(path)!r}: {error.strerror}") from error
    if not existed:
        path.unlink()


def inspected(target: Target, word: str | None, args: argparse.Namespace, step: Callable[[str], None]) -> Report:
    """The report on a target under one word of the flag, None for what the environment says."""
    with flag_unset(word == "unset"), torch.no_grad():
        return explain(
            target.model,
            *target.inputs,
            kwargs=target.kwargs,
            dequant_at_load=FLAG[word] if word else None,
            freezing=args.freezing,
            dynamic=args.dynamic or None,
            title=target.title,
            progress=lambda what: step(f"{what}, flag {word}" if word else what),
        )


def reduced(reports: list[Report], glob: str | None) -> list[Report]:
    """The reports with the weights that match, which must be some."""
    if glob is None:
        return reports
    names = [row.name for report in reports for row in report.weights]
    reports = [report.only(glob) for report in reports]
    if names and not any(report.weights for report in reports):
        raise Failure(f"no weight matches {glob!r}: they are called {some(list(dict.fromkeys(names)))}")
    return reports


def failed(reports: Sequence[Report], actions: Sequence[str]) -> int:
    """1 if a weight met with one of ``actions``, or if there are ``actions`` but no weights; else 0."""
    found = 0
    for report in reports:
        for action in actions:
            names = [row.name for row in report.weights if row.action == action]
            if names:
                print(f"{PROGRAM}: {report.label}: {len(names)} {action}: {some(names)}", file=sys.stderr)
                found = 1
        if actions and not report.weights:
            print(f"{PROGRAM}: {report.label}: {'; '.join(report.notes) or 'no MXFP8 weight'}", file=sys.stderr)
            found = 1
    return found


def some(names: Sequence[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join([*names[:3], *["..."][: len(names) > 3]])


@contextmanager
def flag_unset(unset: bool) -> Iterator[None]:
    """The environment without the flag, if ``unset``."""
    saved = {name: os.environ.pop(name) for name in environment.DEQUANT_AT_LOAD if unset and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields ``step(what)``: on a terminal a line with a clock for what is being done, elsewhere nothing."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what: bar.update(task, description=what)


if __name__ == "__main__":
    sys.exit(main())
