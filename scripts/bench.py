"""Speed on a device, measured side by side: of dequant and quantize against a copy, of linear against a kernel that
only reads the packed bytes (R) and against ``F.linear`` on a dense weight (B), of the host, and over numbers of rows;
of linears that run for long, at the clock that the device's power allows; and the memory bandwidth that linear
achieves, by Nsight Compute. On the CPU: the first two.

Exit status: 0, 2 for a bad argument or where there is no such device. Missed bars are marked, and are no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import options as known
from benchmarks import plot, render
from benchmarks import stored as stored_runs
from benchmarks.options import Options, Record, Run, Shape


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    check_device(args)
    try:
        check_files(args)
        stored = None if args.from_json is None else stored_runs.load(args.from_json, known.SECTIONS)
    except (OSError, ValueError) as error:
        return failed(error)
    try:
        return measure(args, words) if stored is None else show(stored, args)
    except KeyboardInterrupt:
        results = "" if args.json is None else f"; {args.json} has the results until now"
        print(f"bench: stopped{results}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    new.add_argument("--device", default="cuda", choices=known.DEVICES)
    new.add_argument("--sections", nargs="+", choices=known.SECTIONS, help="default: all, quick: all but the last two")
    new.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        metavar="NxK",
        help="of weights; default: seven of real models, three on the CPU",
    )
    new.add_argument(
        "--rows",
        "--m",
        nargs="+",
        type=positive,
        metavar="M",
        help="of x; default: 1 2 4 ... 8192, on the CPU 1 4 16 ... 1024",
    )
    new.add_argument(
        "--dtype",
        default="bfloat16",
        choices=known.CPU_DTYPES,
        help="of x and of the dense weights; float32: on the CPU",
    )
    new.add_argument(
        "--no-emulation", action="store_true", help="leave out the weight dequantized by torch in every call"
    )
    new.add_argument("--quick", action="store_true", help="two shapes, fewer rows and replays: under two minutes")
    new.add_argument(
        "--json", type=Path, metavar="FILE", help="store the run, after every result; with --from-json: what is shown"
    )
    new.add_argument("--markdown", type=Path, metavar="FILE", help="write the page")
    new.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the section linear; needs matplotlib")
    new.add_argument(
        "--from-json",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing: show a stored run, with what later ones measured again (without --markdown and "
        "--plot: print its page)",
    )
    return new


def shape(text: str) -> Shape:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) > 0 and int(k) > 0):
        raise argparse.ArgumentTypeError(f"a shape is NxK, such as 4096x4096, got {text!r}")
    if int(k) % 32:
        raise argparse.ArgumentTypeError(f"K must be a multiple of the block size 32, got {text!r}")
    return int(n), int(k)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number of rows is a positive integer, got {text!r}")
    return int(text)


def check_device(args: argparse.Namespace) -> None:
    """Not every device can be measured in every way."""
    if args.device == "cpu":
        wrong = next((name for name in args.sections or () if name not in known.CPU_SECTIONS), None)
        if wrong is not None:
            parser().error(f"argument --sections: invalid choice: {wrong!r} on the CPU")
    elif args.dtype not in known.DTYPES:
        parser().error(f"argument --dtype: invalid choice: {args.dtype!r} on the device {args.device}")


def failed(reason: object) -> int:
    print(f"bench: {reason}", file=sys.stderr)
    return 2


def check_files(args: argparse.Namespace) -> None:
    """What would fail after the run is to fail before it."""
    for path in (args.json, args.markdown, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if args.plot is not None and args.from_json is None and "linear" not in (args.sections or known.SECTIONS):
        raise ValueError("--plot draws the section linear, which is not among --sections")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib; a run stored with --json can be plotted elsewhere")


def selected(args: argparse.Namespace) -> Options:
    """The options of a run. What is said explicitly counts more than ``--quick``."""
    defaults = known.CPU_DEFAULTS if args.device == "cpu" else known.DEFAULTS
    every_shape, every_row, every_section = defaults[args.quick]
    shapes, rows = args.shapes or every_shape, args.rows or every_row
    sections = args.sections or every_section
    emulated = known.EMULATED_ROWS[:1] if args.quick else known.EMULATED_ROWS
    return Options(
        shapes=tuple(dict.fromkeys(shapes)),
        rows=tuple(dict.fromkeys(rows)),
        dtype=args.dtype,
        sections=tuple(name for name in known.SECTIONS if name in sections),
        emulated=() if args.no_emulation else tuple(m for m in emulated if m in rows),
        replays=7 if args.quick else 11,
        cliff_rows=tuple(range(1, 301, 7 if args.quick else 1)),
    )


def measure(args: argparse.Namespace, words: Sequence[str]) -> int:
    import torch  # not needed to show a stored run
    from benchmarks.devices import DEVICES
    from benchmarks.progress import reporter
    from benchmarks.sections import CPU_SECTIONS, SECTIONS

    missing = DEVICES[args.device].missing()
    if missing is not None:
        return failed(missing)
    options = selected(args)
    torch.manual_seed(0)
    device = DEVICES[args.device].open()
    started = time.monotonic()
    today = {"date": str(datetime.date.today()), "command": known.command("bench.py", words)}
    run = Run(device.environment() | today, options, args.json)
    print(f"{run.data['environment']['device']}, {render.header(run.data)}", flush=True)
    known_sections = CPU_SECTIONS if args.device == "cpu" else SECTIONS
    sections = {name: known_sections[name] for name in options.sections}
    with torch.no_grad(), reporter(sum(section.count(options) for section in sections.values())) as results:
        for name, section in sections.items():
            results.start(name)
            with contextlib.closing(section.measure(device, options)) as records:
                for record in records:
                    run.add(name, record)
                    results.result(render.line(name, record))
    print(f"{time.monotonic() - started:.0f} s, {render.summary(run.data)}", flush=True)
    return write(run.data, args)


def show(run: Record, args: argparse.Namespace) -> int:
    if args.plot is not None and not run["sections"].get("linear"):
        return failed(f"there is nothing to plot: {args.from_json[0]} has no results of the section linear")
    if args.markdown is None and args.plot is None:
        print(render.markdown(run), end="")
    if args.json is not None:
        known.store(run, args.json)
    return write(run, args)


def write(run: Record, args: argparse.Namespace) -> int:
    if args.markdown is not None:
        args.markdown.write_text(render.markdown(run))
        print(f"wrote {args.markdown}")
    if args.plot is not None:
        plot.plot(run, args.plot)
        print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
