"""What ``scripts/bench_model.py`` measures: sections, variants, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SECTIONS = ("blocks", "merge", "model", "trace", "start", "peak", "check")
CPU_SECTIONS = ("model", "start", "check")
"""Those that make sense without a GPU."""
NEED_TRANSFORMERS = ("model", "trace", "start")

VARIANTS = ("bf16", "kept", "folded", "emulation")
"""Of the whole model. bf16 comes first: the others are compared with what it computed."""
TRACED = ("kept", "emulation")
DEVICES = ("cuda", "cpu")
MODES = ("reduce-overhead", "default")

LAYERS = {"cuda": 32, "cpu": 8}
"""Of the whole model, by device."""
START_LAYERS = 4
PEAK_WAYS = ("folded", "frozen", "packed")
CHAINED = 64
"""Linears in a row in the section blocks: the start of a call is shared among so many."""
CHECKED = 64
"""Linears in the graph of the section check."""


@dataclass(frozen=True)
class ModelOptions:
    """What to measure.

    Attributes:
        rows: of x, M, in the section ``blocks``. merge_rows: in ``merge``.
        layers: of the whole model. batches: sequences that it decodes at once.
        prompt: tokens of a sequence that are given. steps: tokens that it decodes, timed.
        repeats: times that they are decoded, of which the median counts.
        rounds: of the other sections, in which columns take turns.
        quantize_head: whether lm_head becomes MXFP8, too.
        tiny: whether the model is one for tests.
        limit: seconds that a process may take.
    """

    device: str = "cuda"
    sections: Sequence[str] = SECTIONS
    variants: Sequence[str] = VARIANTS
    rows: Sequence[int] = (1, 16, 64, 256)
    merge_rows: Sequence[int] = (1, 16)
    layers: int = LAYERS["cuda"]
    batches: Sequence[int] = (1, 16)
    prompt: int = 64
    steps: int = 128
    repeats: int = 3
    rounds: int = 11
    quantize_head: bool = False
    tiny: bool = False
    limit: float = 180

    @staticmethod
    def of(data: dict[str, Any]) -> ModelOptions:
        """What ``asdict`` made, and JSON."""
        tuples: dict[str, Any] = {name: tuple(each) for name, each in data.items() if isinstance(each, list)}
        return ModelOptions(**(data | tuples))

    def data(self) -> dict[str, Any]:
        return asdict(self)
