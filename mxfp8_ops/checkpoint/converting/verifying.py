"""Whether what was written is what it should be: opened again as any reader would, and compared with the source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import CheckpointError, Mismatch, listed
from ..reading import Checkpoint, open_checkpoint
from . import rounding
from .steps import Convert, Quantize, Step


def check_output(
    folder: Path, steps: Sequence[Step], source: Checkpoint, values: bool, progress: bool | None = None
) -> None:
    """Opens the checkpoint in ``folder`` and compares its layers with ``steps``; with ``values`` every tensor as well,
    with what its step makes of ``source`` a second time.

    Raises:
        Mismatch: something differs; it names tensors.
    """
    try:
        output = open_checkpoint(folder)
    except CheckpointError as error:
        raise Mismatch(f"what was written cannot be read again: {error}") from error
    layers = {step.name for step in steps if isinstance(step, Quantize | Convert)}
    if output.keys() != layers:
        raise Mismatch(f"read again, other layers are MXFP8 than should be: {listed(output.keys() ^ layers)}")
    if not values:
        return
    problems = []
    total = sum(info.nbytes for step in steps for info in step.outputs)
    with tqdm(
        total=total, desc="verifying", unit="B", unit_scale=True, disable=None if progress is None else not progress
    ) as bar:
        for step in steps:
            problem = _problem(step, source, output)
            if problem:
                problems.append(f"{step.outputs[0].name} ({problem})")
            bar.update(sum(info.nbytes for info in step.outputs))
    if problems:
        raise Mismatch(f"{len(problems)} of {len(steps)} were not written as they should be: {listed(problems)}")


def _problem(step: Step, source: Checkpoint, output: Checkpoint) -> str:
    """What is wrong with the tensors of a step; "" where nothing is."""
    found = tuple(output.files.read(info.name) for info in step.outputs)
    if isinstance(step, Quantize | Convert):
        found = output.sources[step.name].read_weight(output.files)
    if isinstance(step, Quantize):
        off = rounding.beyond(source.files.read(step.inputs[0].name), found[0], found[1], step.rule)
        if off:
            return f"{off} elements are further off than rounding allows"
    expected = step.run(source.files).tensors
    for info, one, other in zip(step.outputs, expected, found, strict=True):
        if one.dtype != other.dtype or not torch.equal(_as_bytes(one), _as_bytes(other)):
            return f"the values of {info.name} differ"
    return ""


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
