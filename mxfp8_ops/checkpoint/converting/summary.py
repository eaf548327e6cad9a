"""What a conversion has done: as text, and as data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HEADINGS = ("layer", "shape", "", "bytes", "after", "SNR dB", "")
NUMBERS = (3, 4, 5)  # columns to be aligned at the right
MOST = 400
WORST = 20


@dataclass(frozen=True)
class Row:
    """What became of one layer, or of a tensor that belongs to none.

    Attributes:
        name: of the layer or tensor.
        shape: of the weight.
        action: "quantized", "converted" (bit for bit, into another format), "dequantized", "left", "copied".
        reason: why it was left, or dequantized though MXFP8 was wanted; else "".
        bytes_before, bytes_after: of weight and scale, without the bias.
        snr_db: ``10 log10(sum w^2 / sum (w - w')^2)`` over finite elements, in float64; None where none has changed.
        not_finite: elements that are inf or NaN in the result.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    reason: str
    bytes_before: int
    bytes_after: int
    snr_db: float | None = None
    not_finite: int = 0

    def cells(self) -> tuple[str, ...]:
        """The row of a table: see ``HEADINGS``."""
        ratio = "" if self.snr_db is None else f"{self.snr_db:.2f}"
        remark = f"{self.not_finite} elements are inf or NaN" if self.not_finite else self.reason
        shape = "x".join(map(str, self.shape))
        return self.name, shape, self.action, f"{self.bytes_before:,}", f"{self.bytes_after:,}", ratio, remark


@dataclass(frozen=True)
class Summary:
    """What a conversion has done.

    Attributes:
        source, target: the folders, or the file.
        source_format, target_format: names of formats; "unquantized" is one.
        rule: for scales; None where none was made.
        rows: one for each layer, and each tensor that belongs to none.
        notes: what else there is to say, a line each.
        shards: names of the files; resumed: how many of them an earlier run had finished.
        copied: other files that came along.
        verified: whether the output was read again and compared.
        seconds: for all of it.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    rule: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    shards: tuple[str, ...]
    resumed: int
    copied: tuple[str, ...]
    verified: bool
    seconds: float

    @property
    def layers(self) -> tuple[Row, ...]:
        """All rows but those of tensors that are merely copied."""
        return tuple(row for row in self.rows if row.action != "copied")

    def shown(self) -> tuple[Sequence[Row], str]:
        """The rows to print, and what is to be said of the others: of a great many, those of lowest SNR."""
        layers = self.layers
        if len(layers) <= MOST:
            return layers, ""
        worst = sorted((row for row in layers if row.snr_db is not None), key=lambda row: row.snr_db or 0.0)[:WORST]
        odd = [row for row in layers if row.reason or row.not_finite][:WORST]
        return [*worst, *odd], f"of {len(layers)} layers those of lowest SNR, and some that were left: --json has all"

    def lines(self) -> list[str]:
        """Totals and notes."""
        actions: dict[str, list[Row]] = {}
        for row in self.rows:
            actions.setdefault(row.action, []).append(row)
        text = []
        for action, rows in actions.items():
            before, after = (sum(getattr(row, key) for row in rows) for key in ("bytes_before", "bytes_after"))
            noun = "tensors" if action == "copied" else "layers"
            text.append(f"{action}: {len(rows)} {noun}, {_size(before)}" + (f" -> {_size(after)}" * (before != after)))
        text += [f"{row.name}: {row.not_finite} elements are inf or NaN" for row in self.rows if row.not_finite]
        text += self.notes
        if self.resumed:
            text.append(f"resumed: {self.resumed} of {len(self.shards)} files were finished by an earlier run")
        if self.verified:
            text.append("verified: read again, every layer and tensor is what it should be")
        rule = f", rule {self.rule}" if self.rule else ""
        total = sum(row.bytes_after for row in self.rows)
        text.append(
            f"{self.source_format} -> {self.target_format}{rule}: {self.target}, {_size(total)} in {len(self.shards)} "
            f"files, {self.seconds:.1f} s"
        )
        return text

    def __str__(self) -> str:
        rows, more = self.shown()
        cells = [HEADINGS, *(row.cells() for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = [
            "  ".join(_pad(*each) for each in zip(row, widths, range(len(HEADINGS)), strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([*table, *([more] if more else []), "", *self.lines()])

    def to_json(self) -> str:
        """All of it as JSON."""
        data: dict[str, Any] = dataclasses.asdict(self)
        return json.dumps(data, indent=2) + "\n"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column in NUMBERS else cell.ljust(width)


def _size(count: int) -> str:
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.2f} {'kMGT'[power - 1]}B" if power else f"{count} bytes"
