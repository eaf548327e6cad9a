"""Listening to a compile: graphs at the stages between Dynamo and Inductor, and the generated code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import fx

from .. import compat, introspection, passes, report

STAGES = {compat.JOINT_PRE: report.AOT, compat.JOINT_POST: report.JOINT}


class StagePass(passes.Mxfp8Pass):
    """Records the graph as it stands at one of Inductor's slots, and changes nothing."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def __call__(self, graph: fx.Graph) -> None:
        current = passes.current_report()
        if current is not None:
            current.record(self.stage, graph)


def install(patches: dict[str, Any]) -> dict[str, Any]:
    """Patches of Inductor's configuration with a pass at every stage, and with its own book-keeping on."""
    for slot, stage in STAGES.items():
        patches = passes.install(patches, slot, StagePass(stage))
    return {**patches, **introspection.provenance()}


@contextlib.contextmanager
def generated_code() -> Iterator[None]:
    """Adds the code that Inductor generates in the block to the report of its graph."""

    def receive(code: str) -> None:
        current = passes.current_report()
        generated = report.GeneratedCode(normalised(code), introspection.kernel_handles())
        if current is not None and generated not in current.code:  # listeners may be nested
            current.code.append(generated)

    with introspection.output_code(receive):
        yield


def normalised(code: str) -> str:
    """Generated code without what differs from process to process: counters of compiles, paths of caches,
    addresses of constants.
    """
    lines = [line for line in code.splitlines() if not line.startswith(("# AOT ID:", "# kernel path:"))]
    text = re.sub(r"^(_frozen_param\d+ = None .*) [0-9a-f]+$", r"\1", "\n".join(lines), flags=re.MULTILINE)
    return re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/(?=[\w.+-]+)", "", text)
