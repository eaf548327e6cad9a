"""A run of ``scripts/bench_model.py`` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from . import stored
from .cell import table
from .model_options import CHAINED
from .options import Record

MEGABYTE = 1e6
GIGABYTE = 1e9
EAGER = "eager packed"
"""What a kept weight must not be slower than: the same kernels and relus, called without a compiler."""


def markdown(run: Record) -> str:
    """The page of a run, complete or not."""
    lines = [f"# {run['environment']['device']}, compiled models", "", header(run)]
    for section, records in run["sections"].items():
        if not records:
            continue
        lines += ["", f"## {_TITLES[section]}", ""]
        measured = [record for record in records if "failed" not in record]
        if measured:
            lines += _PAGES[section](measured, run["options"])
        failed = [f"{record['job']} failed: {record['failed']}" for record in records if "failed" in record]
        lines += ["", *failed] if measured and failed else failed
        skips = sum(record.get("cudagraph_skips", 0) for record in measured if record.get("mode") != "default")
        lines += ["", f"Graphs that Inductor would not make CUDA graphs of: {skips}."] if skips else []
        lines += stored.origin(run, section)
    return "\n".join(lines) + "\n"


def header(run: Record) -> str:
    environment = run["environment"]
    parts = [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment.get(name)]
    if environment.get("clocks"):
        parts.append(f"SM clock {environment['clocks']['sm']} MHz under load")
    parts += [f"{name}={value}" for name, value in environment.get("switches", {}).items()]
    return ", ".join([*parts, environment["date"], f"`{environment['command']}`"])


def _blocks_page(records: Sequence[Record], options: Record) -> Iterator[str]:
    yield f"{CHAINED} linears of 4096 x 4096 in a row with a relu after each: microseconds a layer. Beside default"
    yield "mode eager packed is the eager model, called; beside reduce-overhead, and without relu where kernels are"
    yield "alone, a CUDA graph of what was called eagerly. x stays where it is in memory, which Dynamo is told, so"
    yield "that no CUDA graph has to copy it."
    yield ""
    names = list(records[0]["us"])
    rows = ([r["mode"], str(r["m"]), *(f"{r['us'][name]:.2f}" for name in names)] for r in records)
    yield from table(("mode", "M", *names), rows)
    for mode in dict.fromkeys(record["mode"] for record in records):
        worst = max(record["us"]["kept"] / record["us"][EAGER] for record in records if record["mode"] == mode)
        yield ""
        yield f"In mode {mode}, kept takes at most {worst:.2f} of {EAGER}."


def _merge_page(records: Sequence[Record], options: Record) -> Iterator[str]:
    names = list(records[0]["us"])
    errors = [name for name in ("error", "error of one block") if name in records[0]]
    yield "The linears of four blocks of Llama-3-8B under reduce-overhead: microseconds a block. Kept with linears on"
    yield "the same x apart, and merged. The error is the norm of the difference between the two over the norm, after"
    yield f"four blocks, which round to bfloat16 many times{', and after one' if errors[1:] else ''}."
    yield ""
    rows = (
        [str(r["m"]), *(f"{r['us'][name]:.1f}" for name in names), *(f"{r[name]:.1e}" for name in errors)]
        for r in records
    )
    yield from table(("M", *names, *errors), rows)


def _model_page(records: Sequence[Record], options: Record) -> Iterator[str]:
    shape = "TinyLlama" if options["device"] == "cpu" else "Llama-3-8B"
    size = "A tiny Llama" if options["tiny"] else f"A model of {shape}'s shape"
    yield f"{size} with {options['layers']} layers and random weights; its linears are MXFP8, lm_head where it"
    yield f"says so. One compiled step on a static cache decodes greedily: {options['steps']} tokens after"
    yield f"{options['prompt'] + 1}, the median of {options['repeats']} times. The variant bf16 has plain linears with"
    yield "the values of the MXFP8 weights, and variants of its run are compared with it: logits of the first step by"
    yield "the largest difference, and how many tokens are the same until the first one that is not, on average over"
    yield "the batch."
    yield ""
    names = ("variant", "batch", "tokens/s", "ms a step", "linears, GB", "allocated, GB", "peak, GB")
    agreement = ("logits differ by", "largest logit", "same tokens")
    yield from table((*names, *agreement, "compile, s"), map(_model_cells, records))


def _model_cells(record: Record) -> Iterator[str]:
    yield from (record["variant"], str(record["batch"]), f"{record['tokens_per_s']:.1f}", f"{record['ms']:.3f}")
    for name in ("linear_bytes", "allocated", "peak"):
        yield f"{record[name] / GIGABYTE:.3f}" if name in record else ""
    found = record["agreement"]
    yield from (
        ("", "", "")
        if found is None
        else (
            f"{found['logits_difference']:.3g}",
            f"{found['logits_largest']:.3g}",
            f"{found['same_tokens']:g} of {found['tokens']}",
        )
    )
    yield f"{record['compile_s']:.1f}"


def _trace_page(records: Sequence[Record], options: Record) -> Iterator[str]:
    yield "One decode step in torch's profiler, after warm-up, with the smallest batch. Gaps are the time in which"
    yield "nothing runs. Large copies are memcpy of more than 1 MB, and kernels of as many threads whose name has copy"
    yield "or clone in it: of weights, or of a static KV cache, of which every layer has two."
    for record in records:
        yield from ("", f"### {record['variant']}", "")
        yield f"{record['kernels']} kernels, {record['us']:.0f} us in all, {record['span']:.0f} us from first to last,"
        yield f"{record['gaps']:.0f} us of gaps, large copies: {record['copies']}"
        yield ""
        rows = ([f"`{row['name']}`", str(row["count"]), f"{row['us']:.1f}"] for row in record["top"])
        yield from table(("kernel", "count", "us"), rows)


def _start_page(records: Sequence[Record], options: Record) -> Iterator[str]:
    yield "Two processes that compile the same model of four layers, kept, one after the other with the same caches on"
    yield "disk, which are empty at first. Seconds from before importing torch until the first steps are there."
    yield ""
    names = ("fx_hits", "fx_misses", "aot_hits", "aot_misses", "aot_bypasses", "triton_files")
    titles = ("FX hits", "FX misses", "AOTAutograd hits", "misses", "bypasses", "new files of Triton")
    rows = (
        [r["run"], f"{r['seconds']:.1f}", f"{r['compile_s']:.1f}", *(str(r[name]) for name in names)] for r in records
    )
    yield from table(("start", "seconds", "of these compiling", *titles), rows)


def _peak_page(records: Sequence[Record], options: Record) -> Iterator[str]:
    yield "2 GiB of linears (as bfloat16): memory while the first call of the compiled model dequantizes or packs them,"
    yield "and afterwards, in MB; and how much the peak is above the bfloat16 weights, and above what is held"
    yield "afterwards, in bfloat16 layers. Folded and packed with `release_quantized=True`; frozen is"
    yield "Inductor's freezing."
    yield ""
    names = ("quantized", "peak", "after")
    rows = (
        [
            record["way"],
            *(f"{record[name] / MEGABYTE:.0f}" for name in names),
            *(_layers(record, record["peak"] - record[name]) for name in ("bf16", "after")),
        ]
        for record in records
    )
    yield from table(("", "before", "peak", "after", "peak - bf16, layers", "peak - after, layers"), rows)


def _layers(record: Record, size: int) -> str:
    return f"{size / record['layer']:.1f}"


def _check_page(records: Sequence[Record], options: Record) -> Iterator[str]:
    for record in records:
        folded, linears = (f"{record['us'][name]:.0f} us" for name in ("folded", "linears"))
        check, more = (f"{record[name]:.2f} us" for name in ("check", "difference"))
        yield f"{record['linears']} tiny linears on the CPU, compiled with the flag on, take {folded} a call, and as"
        yield f"many `nn.Linear` {linears}: {more} a linear more. Of these the check whether its weight is stale takes"
        yield f"{check}. The rest is Dynamo's, which guards and hands over a weight and a scale instead of a weight."


_PAGES: dict[str, Callable[[Sequence[Record], Record], Iterator[str]]] = {
    "blocks": _blocks_page,
    "merge": _merge_page,
    "model": _model_page,
    "trace": _trace_page,
    "start": _start_page,
    "peak": _peak_page,
    "check": _check_page,
}
_TITLES = {
    "blocks": "Linears in compiled graphs",
    "merge": "Linears on the same x merged",
    "model": "A whole model",
    "trace": "One step, by kernel",
    "start": "Cold and warm start",
    "peak": "Peak memory while loading",
    "check": "The check for stale weights",
}
