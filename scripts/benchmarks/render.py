"""A run as text: one line for each record while it goes on, and Markdown afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from . import bars, cell, cpu_page, stored
from .options import HOST_SHAPE, Record, shapes_of

MOST_ROWS_IN_R = 16
"""Up to so many rows of x, reading the weight is what takes time, and R says how good a kernel is."""
OURS = ("packed", "canonical")
VARIANTS = ("packed, dependent",)
BASELINES = ("folded", "emulated", "emulated, compiled")


# --- one record ----------------------------------------------------------------------------------------------


def line(section: str, record: Record) -> str:
    lines = cpu_page.LINES if record.get("place") == "cpu" else _LINES
    return f"{section:<12}" + lines[section](record)


def _elementwise_line(record: Record) -> str:
    cells = [f"{name} {cell.fraction(record, name)}" for name in record["fractions"]]
    copy = f"copy {cell.us(record, 'copy')} us, {cell.spread(record)}"
    return f"{cell.shape(record):<12} of a copy: {', '.join(cells)} | {copy}"


def _linear_line(record: Record) -> str:
    unit = "R" if record["m"] <= MOST_ROWS_IN_R else "B"
    cells = [f"{name} {cell.ratio(record, name, unit)}" for name in OURS]
    cells += [f"{name} {cell.ratio(record, name, 'B')}" for name in BASELINES if name in record["times"]]
    times = "  ".join(f"{name} {cell.us(record, name)}" for name in ("R", "B"))
    return f"{cell.shape(record):<12} M={record['m']:<5} {'  '.join(cells)} | us: {times}, {cell.spread(record)}"


def _host_line(record: Record) -> str:
    return f"{record['mode']:<15} us: " + "  ".join(f"{name} {us:.1f}" for name, us in record["us"].items())


def _cliffs_line(record: Record) -> str:
    (largest, ratio), *_ = _cliffs(record, 0)
    found = ", ".join(f"M={m} ({r:.2f})" for m, r in sorted(_cliffs(record, bars.CLIFF))) or "none"
    most = f"largest ratio to a neighbour {ratio:.2f} at M={largest}"
    return f"{cell.shape(record):<12} {record['column']:<9} {most}; over {bars.CLIFF}: {found}"


def _sustained_line(record: Record) -> str:
    cells = [f"{name} {bars.ratio(record['ratios'][name])} B" for name in OURS]
    return f"{cell.shape(record):<12} M={record['m']:<5} {'  '.join(cells)} | us: B {cell.us(record, 'B')}"


def _bandwidth_line(record: Record) -> str:
    if "skipped" in record:
        return f"skipped: {record['skipped']}"
    longest = {name: max(kernels, key=lambda kernel: kernel["us"]) for name, kernels in record["calls"].items()}
    cells = [f"{name} {kernel['gbs']:.0f} GB/s ({kernel['percent']:.0f}%)" for name, kernel in longest.items()]
    return f"{cell.shape(record):<12} M={record['m']:<5} {'  '.join(cells)}"


_LINES = {
    "elementwise": _elementwise_line,
    "linear": _linear_line,
    "host": _host_line,
    "cliffs": _cliffs_line,
    "sustained": _sustained_line,
    "bandwidth": _bandwidth_line,
}


# --- the page ------------------------------------------------------------------------------------------------


def markdown(run: Record) -> str:
    """The page of a run, complete or not."""
    on_cpu = _is_of_cpu(run)
    method, pages = (cpu_page.method(run), cpu_page.PAGES) if on_cpu else (_method(run), _PAGES)
    lines = [f"# {run['environment']['device']}", "", header(run), "", *method, "", *_verdict(run)]
    for section, records in run["sections"].items():
        if records:
            lines += ["", *pages[section](records), *stored.origin(run, section)]
    return "\n".join(lines) + "\n"


def header(run: Record) -> str:
    environment = run["environment"]
    parts = cpu_page.versions(environment) if _is_of_cpu(run) else _versions(environment)
    parts += [f"{name}={value}" for name, value in environment.get("switches", {}).items()]
    return ", ".join([*parts, environment["date"], f"`{environment['command']}`"])


def _versions(environment: Record) -> list[str]:
    parts = [f"torch {environment['torch']}", f"triton {environment['triton']}", f"CUDA {environment['cuda']}"]
    clocks = environment.get("clocks")
    if clocks:
        parts.append(f"SM clock {clocks['sm']} MHz under load, at most {clocks['sm_max']} MHz")
    return parts


def _is_of_cpu(run: Record) -> bool:
    return run["environment"].get("place") == "cpu"


def summary(run: Record) -> str:
    checked = [verdict for record in _barred(run) for verdict in bars.verdicts(record)]
    return f"{sum(verdict.missed for verdict in checked)} of {len(checked)} bars missed"


def _method(run: Record) -> Iterator[str]:
    options = run["options"]
    yield f"Medians over {options['replays']} replays of CUDA graphs, in which a call rotates through weights (and"
    yield "results) that together are larger than any cache. What stands in one row was measured in turns: all graphs"
    yield "once, then all again. Before each, the cache is read full, so that what the one before has written is in"
    yield "memory by then. The spread is the largest interquartile range of a row, in percent of its median."
    yield "A cache keeps a little of the weights even so, where loads are to be evicted first and so make room for"
    yield "each other: README says how much that is worth."
    yield ""
    name = f"{run['environment']['device'].split()[-1].lower()}-model.md"
    yield f"Linears in compiled graphs, and a whole model: [{name}]({name}), by `scripts/bench_model.py`."


def _verdict(run: Record) -> Iterator[str]:
    missed = [verdict for record in _barred(run) for verdict in bars.verdicts(record) if verdict.missed]
    if not any(True for record in _barred(run) for _ in bars.verdicts(record)):
        yield "No bar of the project applies to these shapes."
        return
    yield summary(run) + (", marked with `!`:" if missed else ".")
    if missed:
        yield ""
        yield from (f"- {verdict}" for verdict in missed)


def _elementwise_page(records: Sequence[Record]) -> Iterator[str]:
    yield "## Dequant and quantize"
    yield ""
    yield "Time of a copy of as many bytes over the operator's, so 100% is the speed of a copy, and more is better."
    yield ""
    names = list(records[0]["fractions"])
    yield from cell.head("N x K", *names, "copy, us", *(f"{name}, us" for name in names), "spread")
    for record in records:
        times = [cell.us(record, name) for name in ("copy", *names)]
        yield cell.row(
            cell.spaced(record), *(cell.fraction(record, name) for name in names), *times, cell.spread(record)
        )


def _linear_page(records: Sequence[Record]) -> Iterator[str]:
    yield "## Linear"
    yield ""
    yield "R is the time of a kernel that only reads as many bytes as the packed weight has, B that of `F.linear` on a"
    yield "weight of x's dtype. Ratios are times, so less is better, and 1.00 R is all that memory allows."
    yield "They are medians over rounds, in each of which both were measured."
    for name, title in (("packed", "`linear_packed`"), ("canonical", "`linear`, on the canonical weight")):
        yield from ("", f"### {title}", "")
        yield from cell.of_shapes(records, partial(_ratios, column=name))
    for n, k in shapes_of(records):
        yield from ("", f"### {n} x {k}", "")
        yield from _linear_table([record for record in records if (record["n"], record["k"]) == (n, k)])
    yield ""
    yield "Folded: `F.linear` on the dequantized weight. Emulated: the weight dequantized in every call by torch's"
    yield "operators, as vLLM's emulation does, eagerly and under `torch.compile`. Error: relative, in the Frobenius"
    yield "norm, against the product in float64 with the same weight. Dependent: with `MXFP8_DEPENDENT_LAUNCH=1`, which"
    yield "lets a kernel start while the one before it ends."


def _linear_table(records: Sequence[Record]) -> Iterator[str]:
    variants, baselines = (
        [name for name in names if any(name in record["times"] for record in records)]
        for names in (VARIANTS, BASELINES)
    )
    timed = ("R", "B", *OURS)
    errors = ("packed", "canonical", "B")
    yield from cell.head(
        "M",
        *OURS,
        *variants,
        *baselines,
        *(f"{name}, us" for name in timed),
        "spread",
        *(f"error of {name}" for name in errors),
    )
    for record in records:
        yield cell.row(
            str(record["m"]),
            *(_ratios(record, name) for name in OURS),
            *(_ratios(record, name) if name in record["times"] else "" for name in variants),
            *(cell.ratio(record, name, "B") if name in record["times"] else "" for name in baselines),
            *(cell.us(record, name) for name in timed),
            cell.spread(record),
            *(f"{record['errors'][name]:.2e}" for name in errors),
        )


def _host_page(records: Sequence[Record]) -> Iterator[str]:
    yield "## Time of the host"
    yield ""
    shape = f"{HOST_SHAPE[0]} x {HOST_SHAPE[1]}"
    yield f"Microseconds that an eager call keeps the CPU busy, {shape}, M=1: many calls in a row, without waiting for"
    yield "the device; the best of several batches. Kernels that take less time than this gain from CUDA graphs."
    yield ""
    names = list(records[0]["us"])
    yield from cell.head("", *(f"`{name}`" for name in names))
    for record in records:
        yield cell.row(f"`{record['mode']}`", *(f"{record['us'][name]:.1f}" for name in names))


def _cliffs_page(records: Sequence[Record]) -> Iterator[str]:
    yield "## Cliffs"
    yield ""
    yield f"Numbers of rows for which a linear takes more than {bars.CLIFF} times as long as for the next smaller or"
    yield "larger one that was measured."
    for record in records:
        rows = sorted(map(int, record["times"]))
        (largest, ratio), *_ = _cliffs(record, 0)
        yield ""
        where = f"{record['column']}, {cell.spaced(record)}, M = {_series(rows)}"
        yield f"{where}: the largest ratio is {ratio:.2f}, at M={largest}."
        found = sorted(_cliffs(record, bars.CLIFF))
        if found:
            yield ""
            yield from cell.head("M", "ratio", "us", "us before", "us after", "ratio, times as multiples of B")
            for m, each in found:
                i = rows.index(m)
                around = [rows[j] if 0 <= j < len(rows) else None for j in (i, i - 1, i + 1)]
                times = ["" if at is None else f"{record['times'][str(at)]['us']:.2f}" for at in around]
                yield cell.row(str(m), f"{each:.2f}", *times, f"{record['ratios of B'][str(m)]:.2f}")


def _sustained_page(records: Sequence[Record]) -> Iterator[str]:
    yield "## For long"
    yield ""
    yield "Calls that nothing interrupts, each kind alone for a second, of which the second half counts: the device"
    yield "slows its clock until it draws no more power than it may. In the tables above kinds take turns, all at the"
    yield "same clock, so that one which draws less gains nothing by it. No bar is for these times."
    yield ""
    kinds = list(records[0]["times"])
    yield from cell.head("N x K", "M", *OURS, *(f"{kind}, {unit}" for unit in ("us", "MHz", "W") for kind in kinds))
    for record in records:
        ratios = [f"{bars.ratio(record['ratios'][kind])} B" for kind in OURS]
        states = [str(record["times"][kind].get(name, "")) for name in ("mhz", "watts") for kind in kinds]
        times = [cell.us(record, kind) for kind in kinds]
        yield cell.row(cell.spaced(record), str(record["m"]), *ratios, *times, *states)


def _bandwidth_page(records: Sequence[Record]) -> Iterator[str]:
    yield "## Bandwidth"
    yield ""
    if "skipped" in records[0]:
        yield f"Skipped: {records[0]['skipped']}."
        return
    yield "What Nsight Compute counts in single launches, with empty caches: bytes that a kernel reads from memory,"
    yield "the time that it takes, and how much of what memory can do at most it uses, for reading and for writing."
    yield ""
    kernels = (
        (cell.spaced(record), str(record["m"]), name, kernel)
        for record in records
        for name, launched in record["calls"].items()
        for kernel in launched
    )
    yield from cell.table(
        ("N x K", "M", "call", "kernel", "us", "MB read", "GB/s", "of peak"),
        ((*cells, f"`{kernel['kernel']}`", *_traffic(kernel)) for *cells, kernel in kernels),
    )


def _traffic(kernel: Record) -> tuple[str, ...]:
    return f"{kernel['us']:.2f}", f"{kernel['bytes'] / 1e6:.2f}", f"{kernel['gbs']:.0f}", f"{kernel['percent']:.0f}%"


_PAGES = {
    "elementwise": _elementwise_page,
    "linear": _linear_page,
    "host": _host_page,
    "cliffs": _cliffs_page,
    "sustained": _sustained_page,
    "bandwidth": _bandwidth_page,
}


# --- cells ---------------------------------------------------------------------------------------------------


def _ratios(record: Record, column: str) -> str:
    units = ("R", "B") if record["m"] <= MOST_ROWS_IN_R else ("B",)
    return ", ".join(cell.ratio(record, column, unit) for unit in units)


def _cliffs(record: Record, over: float) -> list[tuple[int, float]]:
    """Numbers of rows and their ratios, the largest first."""
    found = [(int(m), ratio) for m, ratio in record["ratios"].items() if ratio > over]
    return sorted(found, key=lambda each: -each[1])


def _series(rows: Sequence[int]) -> str:
    return f"{rows[0]}, {rows[1]}, ..., {rows[-1]}"


def _barred(run: Record) -> Iterable[Record]:
    sections = run["sections"]
    return [*sections.get("elementwise", ()), *sections.get("linear", ())]
