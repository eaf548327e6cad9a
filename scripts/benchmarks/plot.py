"""The section ``linear`` of a run as a picture, from its data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .options import Record, shapes_of

LINES = {"packed": "#0072b2", "canonical": "#d55e00", "folded": "#009e73"}  # told apart by the colour-blind, too
"""Of a column that was measured, its colour: there is no packed weight on the CPU."""
MOST_SHAPES = 6
TOP = 3.0
"""Times of B at which the axis ends at the latest."""


def plot(run: Record, path: Path) -> None:
    """Writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    draw(run).savefig(path, format="png", dpi=110)


def draw(run: Record) -> Any:
    """A figure of the time of a linear relative to B over the rows of x, for the first six shapes."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    records = run["sections"]["linear"]
    shapes = shapes_of(records)[:MOST_SHAPES]
    down = -(-len(shapes) // 3)
    figure = Figure(figsize=(15, 0.7 + 3.9 * down), layout="constrained")
    panels = list(figure.subplots(down, 3, sharey=True).flat)
    for panel in panels:
        panel.set_visible(False)
    for panel, (n, k) in zip(panels, shapes, strict=False):
        of_shape = sorted((r for r in records if (r["n"], r["k"]) == (n, k)), key=lambda record: record["m"])
        _panel(panel, f"{n} x {k}", of_shape)
    highest = max(r["ratios"][name]["B"] for r in records for name in LINES if name in r["ratios"])
    figure.axes[0].set_ylim(0, min(TOP, max(1.2, 1.05 * highest)))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    environment = run["environment"]
    figure.suptitle(
        f"MXFP8 linear relative to {run['options']['dtype']} F.linear (B = 1), {environment['device']}, "
        f"torch {environment['torch']}, {environment['date']}"
    )
    return figure


def _panel(panel: Any, title: str, records: list[Record]) -> None:
    rows = [record["m"] for record in records]
    panel.set_visible(True)
    panel.axhline(1, color="#999999", linewidth=1)
    measured = {name: colour for name, colour in LINES.items() if name in records[0]["ratios"]}
    for name, colour in measured.items():
        values = [record["ratios"][name]["B"] for record in records]
        panel.plot(rows, values, color=colour, marker="o", markersize=4, linewidth=2, label=name)
    form = "packed" if "packed" in measured else "canonical"
    floor = [record["ratios"]["R"]["B"] for record in records]
    panel.plot(rows, floor, color="#333333", linestyle="--", linewidth=1.3, label=f"R: only reading the {form} weight")
    panel.set_title(title)
    panel.set_xscale("log", base=2)
    panel.set_xticks(rows, [str(m) for m in rows], fontsize=8, rotation=45 if len(rows) > 8 else 0)
    panel.minorticks_off()
    panel.grid(axis="y", color="#e5e5e5")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("rows of x, M")
    panel.set_ylabel("time / B")
