"""Converts checkpoints: bfloat16, float16 or float32 to MXFP8; MXFP8 to one of these; or MXFP8 from one format to
another, in which case every code and every scale stays as it is, bit for bit.

SOURCE is a folder with .safetensors files, or one such file; MXFP8 is recognised in eleven formats. TARGET is a folder
that does not exist yet. It appears when it is complete; until then everything is in TARGET.partial, and the same
command goes on there if it was killed. Memory holds one tensor at a time.

Of an unquantized checkpoint the linears are quantized that are [N, K] with K a multiple of 32, but not those that
compute the output or route to experts. What is a linear the architecture tells, if transformers is installed and knows
it, and otherwise names. PATTERN has wildcards (* and ?) for whole names of layers, such as '*.mlp.*'.

Exit status: 0; 1 if --verify found a difference; 2 after an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

import mxfp8_ops

from ...format import QUANTIZE_RULES
from ..errors import Mismatch
from ..formats import WRITABLE
from ..formats.plain import Unquantized
from .converter import SHARD_BYTES, convert
from .summary import HEADINGS, NUMBERS, Summary

PROGRAM = "mxfp8-convert"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(argv: Sequence[str] | None = None) -> int:
    """The console command ``mxfp8-convert``; returns its exit status."""
    args = parse_arguments(argv)
    try:
        run(args)
        return 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted: the same command goes on from where it was", file=sys.stderr)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, Mismatch) else 2
    return 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked; exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a folder with a checkpoint, or a .safetensors file")
    add("target", type=Path, metavar="TARGET", help="a folder that does not exist yet")
    formats = (*WRITABLE, *DTYPES)
    add("--to", choices=formats, default="modelopt", metavar="FORMAT", help=f"{', '.join(formats)} (default modelopt)")
    add("--rule", choices=QUANTIZE_RULES, help="how scales are chosen when weights are quantized (default rceil)")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="leave such layers; may be repeated")
    add("--only", action="append", default=[], metavar="PATTERN", help="leave all but such layers; may be repeated")
    add("--max-shard-size", type=size, default=SHARD_BYTES, metavar="SIZE", help="of a file (default 5GB)")
    add("--verify", action="store_true", help="read the result again and compare it before it appears")
    add("--force", action="store_true", help="replace TARGET, and the file of --json, if they exist")
    add("--json", type=Path, metavar="FILE", help="write the summary as JSON")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"{PROGRAM} {mxfp8_ops.__version__}, torch {torch.__version__}")
    return parser.parse_args(argv)


def size(text: str) -> int:
    """Bytes of a number with a unit, such as "500MB"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?B|)", text.upper())
    count = int(float(match[1]) * _UNITS.get(match[2], 1)) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return count


def run(args: argparse.Namespace) -> None:
    """Converts, prints and writes; raises what ``convert`` raises."""
    if args.json is not None:
        check_json(args.json, args.force)
    summary = convert(
        args.source,
        args.target,
        Unquantized.name if args.to in DTYPES else args.to,
        args.rule,
        args.ignore,
        only=args.only,
        dtype=DTYPES.get(args.to),
        max_shard_bytes=args.max_shard_size,
        verify=args.verify,
        force=args.force,
    )
    show(summary)
    if args.json is not None:
        args.json.write_text(summary.to_json(), encoding="utf-8")


def check_json(path: Path, force: bool) -> None:
    """Raises OSError, before anything takes time, where the summary could not be written."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists: choose another file, or --force to replace it")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: {path.parent} is no folder, or it is one itself")


def show(summary: Summary) -> None:
    """Prints the summary: a table where rich is installed, which wraps and colours on a terminal only."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(summary)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    rows, more = summary.shown()
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if column in NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.cells(), style="dim" if row.action == "left" else None)
    console.print(table)
    for line in filter(None, [more, *summary.lines()]):
        console.print(line, markup=False, soft_wrap=True)


def one_line(error: BaseException) -> str:
    """The error in a line, with its kind unless it is one that is meant for the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: {message}"


if __name__ == "__main__":
    sys.exit(main())
