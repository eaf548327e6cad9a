"""What becomes of every tensor of a checkpoint: decided from its headers alone, before a value is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...format import BLOCK_SIZE
from ..errors import CheckpointError, listed
from ..formats import Description, Format
from ..formats.comfyui import MARKER, ComfyUI
from ..formats.plain import Unquantized
from ..headers import TensorInfo
from ..layer import ELEMENT, LayerSource
from ..names import OF_ACTIVATIONS, wildcards
from ..reading import Checkpoint
from .linears import Linears
from .steps import Convert, Copy, Dequantize, Leave, Quantize, Step

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Options:
    """What is wanted.

    Attributes:
        format: to write in; None for no quantization at all.
        rule: for scales, see ``mxfp8_ops.quantize``.
        ignore, only: wildcards for names of layers that are not to be quantized, or alone.
        dtype: of layers that are dequantized.
    """

    format: type[Format] | None
    rule: str = "rceil"
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16


class Plan(NamedTuple):
    """What a conversion does.

    Attributes:
        steps: in the order in which the tensors are in the source.
        unquantized: modules that the config must name.
        notes: what else is to be said, a line each.
    """

    steps: list[Step]
    unquantized: list[str]
    notes: list[str]


def plan(checkpoint: Checkpoint, options: Options, find_linears: Callable[[], Linears]) -> Plan:
    """What becomes of ``checkpoint``.

    Args:
        find_linears: called for unquantized checkpoints only.

    Raises:
        CheckpointError: a layer cannot be said in the format, or there is nothing to convert.
    """
    notes, linears = [], Linears("")
    if not isinstance(checkpoint.format, Unquantized):
        steps = list(_of_mxfp8(checkpoint, options))
    elif options.format is None:
        raise CheckpointError(f"{checkpoint.path} is not quantized: there is nothing to dequantize")
    else:
        linears = find_linears()
        notes.append(linears.how)
        steps = list(_of_floats(checkpoint, options, options.format, linears))
    if options.format is not None and not any(isinstance(step, Quantize | Convert) for step in steps):
        left = [f"{step.name}: {step.reason}" for step in steps if step.reason]
        raise CheckpointError(f"{checkpoint.path}: no layer would be MXFP8: {listed(left) or 'none is [N, K]'}")
    names = Counter(info.name for step in steps for info in step.outputs)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CheckpointError(f"{checkpoint.path}: two tensors would be called {listed(twice)}")
    return Plan(steps, _unquantized(steps, linears), notes + _remarks(checkpoint, options))


def _unquantized(steps: Sequence[Step], linears: Linears) -> list[str]:
    """Whatever has a matrix and is not known to be an embedding, modules of experts, and linears that have no tensor of
    their own: loaders take any other linear for MXFP8.
    """
    left = [step.outputs[0].name.rpartition(".")[0] for step in steps if isinstance(step, Leave | Dequantize)]
    quantized = {step.name for step in steps if isinstance(step, Quantize | Convert)}
    names = {*left, *linears.absent} - quantized - {""}
    return sorted(name for name in names if not linears.is_embedding(name))


def check_says(format: type[Format], config: dict[str, Any], steps: Sequence[Step]) -> None:
    """Raises CheckpointError where a config of that format, read again, would not have all of the layers."""
    said = format.match(Description(config))
    lost = [
        step.name
        for step in steps
        if isinstance(step, Quantize | Convert) and (said is None or said.quantized(step.name) is False)
    ]
    if lost:
        raise CheckpointError(f"{format.name} cannot name all that is not quantized without {listed(lost)}")


# --- unquantized checkpoints ----------------------------------------------------------------------------------------


def _of_floats(checkpoint: Checkpoint, options: Options, format: type[Format], linears: Linears) -> Iterator[Step]:
    for info in checkpoint.files.values():
        layer = info.name.removesuffix(".weight")
        if len(info.shape) > 2 and "experts" in info.name.split("."):
            yield _copy(info, Leave, "experts in one tensor, of which nobody says along which dimension K runs")
        elif layer == info.name or len(info.shape) != 2:
            yield _copy(info)
        elif reason := _why_left(layer, info, options, linears):
            yield _copy(info, Leave, reason)
        else:
            yield Quantize(layer, info.shape, (info,), _outputs(layer, info, info.shape, format), options.rule)


def _why_left(layer: str, info: TensorInfo, options: Options, linears: Linears) -> str:
    if info.dtype not in _DTYPES.values():
        return f"{info.dtype} is not {', '.join(_DTYPES.values())}"
    if 0 in info.shape:
        return "it is empty"
    if wildcards(layer, options.ignore):
        return "ignored on request"
    if options.only and not wildcards(layer, options.only):
        return "not among those asked for"
    reason = linears.why_not(layer)
    if not reason and info.shape[-1] % BLOCK_SIZE:
        return f"K = {info.shape[-1]} is not a multiple of {BLOCK_SIZE}"
    return reason


# --- MXFP8 checkpoints ----------------------------------------------------------------------------------------------


def _of_mxfp8(checkpoint: Checkpoint, options: Options) -> Iterator[Step]:
    sources = {source.weight.name: source for source in checkpoint.sources.values()}
    scales = {source.scale.name for source in checkpoint.sources.values()}
    for info in checkpoint.files.values():
        if info.name in sources:
            yield _of_layer(sources[info.name], options)
        elif info.name in scales or (isinstance(checkpoint.format, ComfyUI) and info.name.endswith(MARKER)):
            continue
        elif info.name.endswith(".weight") and len(info.shape) == 2:
            yield _copy(info, Leave, "not quantized in the source")
        else:
            yield _copy(info)


def _of_layer(source: LayerSource, options: Options) -> Step:
    inputs, shape = (source.weight, source.scale), source.shape
    reason = ""
    if options.format is not None and shape[-1] % BLOCK_SIZE:
        reason = f"K = {shape[-1]} is not a multiple of {BLOCK_SIZE}, which {options.format.name} cannot say"
    if options.format is None or reason:
        dense = TensorInfo(source.parameter, _DTYPES[options.dtype], shape, Path())
        return Dequantize(source.name, shape, inputs, (dense,), source, options.dtype, reason=reason)
    outputs = _outputs(source.name, source.weight, shape, options.format, source.parameter == source.name)
    return Convert(source.name, shape, inputs, outputs, source)


# --- both -----------------------------------------------------------------------------------------------------------


def _outputs(
    layer: str, weight: TensorInfo, shape: tuple[int, ...], format: type[Format], bare: bool = False
) -> tuple[TensorInfo, ...]:
    """The headers of weight and scale. ``bare``: of a parameter of experts, not of a module with a ``.weight``."""
    names = next((each for each in format.names if (each.weight == "") is bare), None)
    if names is None or (len(shape) > 2 and len(format.names) == 1):
        raise CheckpointError(
            f"{weight} holds experts in one tensor, of which {format.name} has one linear each: choose another format"
        )
    return (
        TensorInfo(layer + names.weight, ELEMENT, shape, Path()),
        TensorInfo(layer + names.scale, "U8", (*shape[:-1], shape[-1] // BLOCK_SIZE), Path()),
    )


def _copy(info: TensorInfo, kind: type[Copy] = Copy, reason: str = "") -> Copy:
    name = info.name if kind is Copy else info.name.removesuffix(".weight")
    return kind(name, info.shape, (info,), (replace(info, file=Path()),), reason=reason)


def _remarks(checkpoint: Checkpoint, options: Options) -> list[str]:
    remarks = []
    of_activations = [name for name in checkpoint.plain if name.endswith(OF_ACTIVATIONS)]
    if of_activations:
        remarks.append(f"copied, but not named in the config: scales of activations, {listed(of_activations, 2)}")
    for kind, patterns in (("ignored", options.ignore), ("asked for", options.only)):
        layers = [name.removesuffix(".weight") for name in checkpoint.plain]
        idle = [pattern for pattern in patterns if not any(wildcards(layer, [pattern]) for layer in layers)]
        if idle:
            remarks.append(f"no layer matches what is {kind}: {listed(idle)}")
    return remarks
