"""A run on the CPU as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import bars, cell
from .options import Record, shapes_of

OURS = ("canonical", "folded", "compiled", "backend")
BASELINES = ("emulated", "emulated, compiled", "torchao")
MOST_ROWS_IN_R = 4
"""Up to so many rows of x, reading the weight is what takes time."""


# --- one record ----------------------------------------------------------------------------------------------


def _elementwise_line(record: Record) -> str:
    cells = [f"{name} {cell.fraction(record, name)}" for name in record["fractions"]]
    return f"{cell.shape(record):<12} of a copy: {', '.join(cells)} | copy {_gbs(record)} GB/s, {cell.spread(record)}"


def _linear_line(record: Record) -> str:
    cells = [f"{name} {_ratio(record, name)}" for name in (*OURS, *BASELINES) if name in record["times"]]
    times = "  ".join(f"{name} {cell.us(record, name)}" for name in ("R", "B"))
    return f"{cell.shape(record):<12} M={record['m']:<5} {'  '.join(cells)} | us: {times}, {cell.spread(record)}"


LINES = {"elementwise": _elementwise_line, "linear": _linear_line}


# --- the page ------------------------------------------------------------------------------------------------


def versions(environment: Record) -> list[str]:
    """What decides about speed."""
    sizes = [f"{name} {size >> 10} KiB" for name, size in environment["caches"].items()]
    threads = environment["threads"]
    parts = [f"kernels {environment['level']}", f"{threads} thread{'s' * (threads != 1)}"]
    parts += [f"load of the machine before the run {environment['load']}", *sizes]
    parts += [f"weights rotate over {environment['rotated'] >> 20} MiB", f"torch {environment['torch']}"]
    parts += [f"torchao {environment['torchao']}"] if environment["torchao"] else []
    return [*parts, environment["compiler"] or "no C++ compiler", f"Python {environment['python']}"]


def method(run: Record) -> Iterator[str]:
    options, level = run["options"], run["environment"]["level"]
    yield f"Medians over {options['replays']} rounds, in which calls rotate through weights that together are larger"
    yield "than the caches. What stands in one row was measured in turns: every column once, then all again. The spread"
    yield "is the largest interquartile range of a row, in percent of its median."
    if level not in bars.CPU_LEVELS:
        yield ""
        yield f"The bars of the project are for kernels of the levels {', '.join(bars.CPU_LEVELS)}. These are {level}."


def _elementwise_page(records: Sequence[Record]) -> Iterator[str]:
    yield "## Dequant and quantize"
    yield ""
    yield "Bytes that are moved in a second as a fraction of those that a copy moves, so more is better. An operator's"
    yield "result is new memory, and so is that of its copy, which is as large: of a dense weight for dequant, of a"
    yield "quantized one for quantize. A kernel alone writes to memory that has been written before, and so does its"
    yield "copy."
    yield ""
    names = list(records[0]["fractions"])
    copies = [name for name in records[0]["times"] if name not in names]
    timed = (*copies, *names)
    yield from cell.head("N x K", *names, "copy, GB/s", *(f"{name}, us" for name in timed), "spread")
    for record in records:
        fractions = (cell.fraction(record, name) for name in names)
        times = (cell.us(record, name) for name in timed)
        yield cell.row(cell.spaced(record), *fractions, _gbs(record), *times, cell.spread(record))


def _linear_page(records: Sequence[Record]) -> Iterator[str]:
    dtype = records[0]["dtype"]
    yield "## Linear"
    yield ""
    yield f"x is {dtype}. B is the time of `F.linear` on a weight of that dtype, R that of only reading the bytes of"
    yield "the quantized weight. Ratios are times, so less is better, and 1.00 R is all that memory allows."
    yield "They are medians over rounds, in each of which both were measured."
    yield ""
    yield "Quantized weights, which are what R reads, lie in large pages where the system has them, as `quantize` and"
    yield "checkpoints give them; dense ones lie where torch puts them."
    yield from ("", "### `mxfp8::linear`", "")
    yield from cell.of_shapes(records, lambda record: _ratio(record, "canonical"))
    for n, k in shapes_of(records):
        yield from ("", f"### {n} x {k}", "")
        yield from _linear_table([record for record in records if (record["n"], record["k"]) == (n, k)])
    yield ""
    yield "Canonical: `mxfp8::linear`. Folded: `F.linear` on the dequantized weight. Compiled: `mxfp8::linear` under"
    yield 'plain `torch.compile`; backend: with `backend="mxfp8"`; both as multiples of the eager call, too.'
    yield "Emulated: the weight dequantized in every call by torch's operators, as vLLM's emulation does, eagerly and"
    yield "under `torch.compile`. torchao: float8 weights with a scale a row. Error: relative, in the Frobenius norm,"
    yield "against the product in float64 with the same weight."


def _linear_table(records: Sequence[Record]) -> Iterator[str]:
    columns = [name for name in (*OURS, *BASELINES) if any(name in record["times"] for record in records)]
    errors = list(records[0]["errors"])
    timed = ("R", "B", "canonical")
    yield from cell.head(
        "M", *columns, *(f"{name}, us" for name in timed), "R, GB/s", "spread", *(f"error of {name}" for name in errors)
    )
    for record in records:
        yield cell.row(
            str(record["m"]),
            *(_ratio(record, name) if name in record["times"] else "" for name in columns),
            *(cell.us(record, name) for name in timed),
            f"{record['n'] * record['k'] * 33 / 32 / record['times']['R']['us'] / 1e3:.1f}",
            cell.spread(record),
            *(f"{record['errors'][name]:.2e}" for name in errors),
        )


PAGES = {"elementwise": _elementwise_page, "linear": _linear_page}


# --- cells ---------------------------------------------------------------------------------------------------


def _ratio(record: Record, column: str) -> str:
    """In multiples of what says most about a column."""
    if column in ("compiled", "backend"):
        units = ["B", "canonical"]
    elif column == "canonical" and record["m"] <= MOST_ROWS_IN_R:
        units = ["B", "R"]
    else:
        units = ["B"]
    return ", ".join(cell.ratio(record, column, unit) for unit in units)


def _gbs(record: Record) -> str:
    """Bytes that the copy moves, read and written."""
    return f"{record['bytes'] / record['times']['copy']['us'] / 1e3:.1f}"
