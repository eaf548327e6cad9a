"""A record of ``scripts/bench_model.py`` as one line, while the run goes on."""

from __future__ import annotations

from collections.abc import Callable

from .options import Record


def line(section: str, record: Record) -> str:
    if "failed" in record:
        return f"{section:<7} {record['job']} failed: {record['failed']}"
    return f"{section:<7} {_LINES[section](record)} ({record['seconds']:.0f} s)"


def _us(record: Record) -> str:
    return "  ".join(f"{name} {us:.2f}" for name, us in record["us"].items())


def _model_line(record: Record) -> str:
    agreement = record["agreement"]
    words = f"{record['variant']}, batch {record['batch']}: {record['ms']:.2f} ms a step"
    words += f", {record['tokens_per_s']:.0f} tokens/s, linears {record['linear_bytes'] / 1e9:.2f} GB"
    return words if agreement is None else f"{words}, logits differ by {agreement['logits_difference']:.3g}"


def _trace_line(record: Record) -> str:
    return (
        f"{record['variant']}: {record['kernels']} kernels, {record['us']:.0f} us, gaps {record['gaps']:.0f} us, "
        f"large copies: {record['copies']}"
    )


def _start_line(record: Record) -> str:
    hits = f"FX graph cache {record['fx_hits']} hits, AOTAutograd cache {record['aot_hits']} hits"
    return f"{record['run']}: {record['seconds']:.1f} s, {hits}, {record['triton_files']} new files of Triton"


_LINES: dict[str, Callable[[Record], str]] = {
    "blocks": lambda record: f"{record['mode']}, M={record['m']}: us a layer: {_us(record)}",
    "merge": lambda record: f"M={record['m']}: us a block: {_us(record)}, error {record['error']:.2g}",
    "model": _model_line,
    "trace": _trace_line,
    "start": _start_line,
    "peak": lambda record: (
        f"{record['way']}: peak {(record['peak'] - record['bf16']) / record['layer']:.1f} layers above bf16"
    ),
    "check": lambda record: f"{record['check']:.2f} of {record['difference']:.2f} us a linear",
}
