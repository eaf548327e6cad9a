"""Speed and memory of models that torch.compile has compiled: linears in compiled graphs beside eager kernels, merged
linears, a whole Llama that decodes, its kernels, cold and warm start, peak memory, the check for stale weights.

Every part runs in a process of its own; one that fails or takes too long is reported, and the others go on.
Exit status: 0; 1 where a part failed; 2 for a bad argument, or where there is no such device or no transformers.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import model_lines, model_page, options
from benchmarks import model_options as known
from benchmarks import stored as stored_runs
from benchmarks.jobs import jobs, run
from benchmarks.model_options import ModelOptions
from benchmarks.options import Record, Run
from benchmarks.progress import reporter


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    try:
        check_files(args)
        stored = None if args.from_json is None else stored_runs.load(args.from_json, known.SECTIONS)
        return measure(args, words) if stored is None else show(stored, args)
    except (OSError, ValueError) as error:
        print(f"bench_model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        results = "" if args.json is None else f"; {args.json} has the results until now"
        print(f"bench_model: stopped{results}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    default = ModelOptions()
    new = argparse.ArgumentParser(
        prog="bench_model.py", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    new.add_argument("--device", default="cuda", choices=known.DEVICES, help="cpu: a smaller model, fewer sections")
    new.add_argument("--sections", nargs="+", choices=known.SECTIONS, help="default: all that the device has")
    new.add_argument("--variants", nargs="+", choices=known.VARIANTS, default=known.VARIANTS, help="of the model")
    new.add_argument("--layers", type=positive, help="of the model; default: 32, on the CPU 8")
    new.add_argument("--batches", nargs="+", type=positive, default=default.batches, metavar="N", help="default: 1 16")
    new.add_argument("--prompt", type=positive, default=default.prompt, metavar="TOKENS", help="default: 64")
    new.add_argument("--steps", type=positive, default=default.steps, metavar="TOKENS", help="decoded; default: 128")
    new.add_argument("--quantize-head", action="store_true", help="lm_head becomes MXFP8, too")
    new.add_argument("--rows", nargs="+", type=positive, default=default.rows, metavar="M", help="of section blocks")
    new.add_argument("--tiny", action="store_true", help="a model for tests")
    new.add_argument(
        "--limit", type=positive, default=default.limit, metavar="SECONDS", help="of a process; default: 180"
    )
    new.add_argument(
        "--json", type=Path, metavar="FILE", help="store the run, after every result; with --from-json: what is shown"
    )
    new.add_argument("--markdown", type=Path, metavar="FILE", help="write the page")
    new.add_argument(
        "--from-json",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing: show a stored run, with what later ones measured again (without --markdown: print)",
    )
    return new


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def check_files(args: argparse.Namespace) -> None:
    """What would fail after the run is to fail before it."""
    for path in (args.json, args.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")


def selected(args: argparse.Namespace) -> ModelOptions:
    """The options of a run.

    Raises:
        ValueError: the device cannot run what was asked for.
    """
    possible = known.CPU_SECTIONS if args.device == "cpu" else known.SECTIONS
    wanted = args.sections or possible
    impossible = sorted(set(wanted) - set(possible))
    if impossible:
        raise ValueError(f"the sections {', '.join(impossible)} need a CUDA device")
    return ModelOptions(
        device=args.device,
        sections=tuple(name for name in known.SECTIONS if name in wanted),
        variants=tuple(name for name in known.VARIANTS if name in args.variants),
        rows=tuple(dict.fromkeys(args.rows)),
        layers=args.layers or known.LAYERS[args.device],
        batches=tuple(dict.fromkeys(args.batches)),
        prompt=args.prompt,
        steps=args.steps,
        quantize_head=args.quantize_head,
        tiny=args.tiny,
        limit=args.limit,
    )


def environment(device: str) -> Record:
    """Where the run is made.

    Raises:
        ValueError: there is no such device.
    """
    import torch
    from benchmarks.devices import DEVICES

    if device == "cpu":
        threads = f"CPU, {torch.get_num_threads()} threads"
        return {"device": threads, "torch": torch.__version__, "python": platform.python_version()}
    missing = DEVICES[device].missing()
    if missing is not None:
        raise ValueError(missing)
    opened = DEVICES[device].open()
    found = opened.environment()
    opened.release()
    return found


def measure(args: argparse.Namespace, words: Sequence[str]) -> int:
    chosen = selected(args)
    needed = sorted(set(chosen.sections) & set(known.NEED_TRANSFORMERS))
    versions = {}
    if needed:
        if importlib.util.find_spec("transformers") is None:
            raise ValueError(f"the package transformers is not installed, which the sections {', '.join(needed)} need")
        versions = {"transformers": importlib.metadata.version("transformers")}
    today = {"date": str(datetime.date.today()), "command": options.command("bench_model.py", words)}
    stored = Run(environment(args.device) | versions | today, chosen, args.json)
    print(f"{stored.data['environment']['device']}, {model_page.header(stored.data)}", flush=True)
    started, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        planned = list(jobs(chosen, Path(name)))
        with reporter(sum(job.count for job in planned)) as results:
            for job in planned:
                results.start(f"{job.sections[0]}: {job.name}")
                for section, record in run(job, chosen, Path(name)):
                    failed += "failed" in record
                    stored.add(section, record)
                    results.result(model_lines.line(section, record))
    print(f"{time.monotonic() - started:.0f} s, {failed} of {len(planned)} processes failed", flush=True)
    write(stored.data, args)
    return 1 if failed else 0


def show(stored: Record, args: argparse.Namespace) -> int:
    if args.markdown is None:
        print(model_page.markdown(stored), end="")
    if args.json is not None:
        options.store(stored, args.json)
    write(stored, args)
    return 0


def write(stored: Record, args: argparse.Namespace) -> None:
    if args.markdown is not None:
        args.markdown.write_text(model_page.markdown(stored))
        print(f"wrote {args.markdown}")


if __name__ == "__main__":
    sys.exit(main())
