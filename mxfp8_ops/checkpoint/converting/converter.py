"""``convert``: a checkpoint into another one, shard by shard."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ... import __version__
from ...format import check_compute_dtype, check_rule
from ..documents import CONFIG, SAFETENSORS_INDEX
from ..errors import CheckpointError, listed
from ..formats import WRITABLE
from ..formats.plain import Unquantized
from ..reading import Checkpoint, open_checkpoint
from . import companions
from .linears import linears_of
from .plan import Options, Plan, check_says, plan
from .shards import Shard, index, split
from .steps import Step
from .summary import Row, Summary
from .verifying import check_output
from .writing import Draft, check_target, drafting, write_json

SHARD_BYTES = 5_000_000_000


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str = "modelopt",
    rule: str | None = None,
    ignore: Iterable[str] = (),
    *,
    only: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    force: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Makes an MXFP8 checkpoint of an unquantized one, an unquantized one of an MXFP8 one, or changes the format, in
    which case every code and every scale stays as it is, bit for bit.

    Tensors are read and written one at a time. The result appears at ``target`` when it is complete; until then it is
    in ``<target>.partial``, from where an equal call goes on after it was killed.

    Args:
        source: a folder with a checkpoint, or a single .safetensors file.
        target: a folder that does not exist yet, or is empty.
        format: "modelopt", "mxfp8", "fp8-1x32" or "compressed-tensors"; "unquantized" for plain weights.
        rule: how scales are chosen, see ``mxfp8_ops.quantize``; None is "rceil". Only for unquantized sources.
        ignore: wildcards (``*``, ``?``) for names of layers that are not to be quantized.
        only: wildcards for those that alone are.
        dtype: of weights that are dequantized: float32, bfloat16 or float16; None is what config.json says, or else
            bfloat16. Other tensors keep theirs.
        max_shard_bytes: of the tensors in a file; a larger tensor has one of its own.
        verify: whether to read the result again and compare it, layer by layer, before it appears.
        force: whether to replace a checkpoint at ``target``.
        progress: a bar on stderr; None for one where that is a terminal.

    Raises:
        CheckpointError (a ValueError): the source cannot be read, or cannot be said in the format. Mismatch, a
        CheckpointError: verification failed, and nothing has appeared. FileExistsError: the target exists.
        RuntimeError: another process is writing it. OSError: no space, or no right to write. ValueError, TypeError: an
        unknown format, rule or dtype.
    """
    start = time.perf_counter()
    source, target = _places(Path(source), Path(target))
    check_target(target, force)
    checkpoint = open_checkpoint(source)
    options = _options(checkpoint, format, rule, tuple(ignore), tuple(only), dtype)
    planned = plan(checkpoint, options, lambda: linears_of(_folder(source), checkpoint.config))
    shards = split(planned.steps, max_shard_bytes)
    documents = {**_documents(checkpoint, options, planned), **index(shards)}
    state = _state(checkpoint)
    others, outside = companions.companions(source)
    with drafting(target, _fingerprint(state, options, shards, documents), force) as draft:
        rows, resumed = _write(draft, shards, checkpoint, progress)
        _complete(draft, shards, documents, others)
        check_output(draft.folder, planned.steps, checkpoint, verify, progress)
        if _state(checkpoint) != state:
            raise CheckpointError(f"{source} has changed while it was read: nothing was written, run it again")
        draft.publish()
    if outside:
        planned.notes.append(f"links that lead out of the folder were not followed: {listed(outside)}")
    return Summary(
        str(source),
        str(target),
        checkpoint.format.name,
        format,
        options.rule if isinstance(checkpoint.format, Unquantized) else None,
        tuple(rows[step.outputs[0].name] for step in planned.steps),
        tuple(planned.notes),
        tuple(shard.name for shard in shards),
        resumed,
        tuple(each.name for each in others),
        verify,
        time.perf_counter() - start,
    )


def _places(source: Path, target: Path) -> tuple[Path, Path]:
    """Of an index its folder, and the target without links. Raises ValueError where one is, or lies in, the other."""
    if source.name.endswith(SAFETENSORS_INDEX) and source.is_file():
        source = source.parent
    target, real = target.resolve(), source.resolve()
    if target == real or (real.is_dir() and real in target.parents) or target in real.parents:
        raise ValueError(f"the target {target} must be a folder apart from the source {source}")
    return source, target


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _options(
    checkpoint: Checkpoint,
    format: str,
    rule: str | None,
    ignore: tuple[str, ...],
    only: tuple[str, ...],
    dtype: torch.dtype | None,
) -> Options:
    if format != Unquantized.name and format not in WRITABLE:
        raise ValueError(f"unknown format {format!r}: use one of {', '.join([*WRITABLE, Unquantized.name])}")
    if rule is not None:
        check_rule(rule)
    if dtype is not None:
        check_compute_dtype(dtype, "dtype")
        if format != Unquantized.name:
            raise ValueError(f"dtype {dtype} is that of unquantized weights, and the format is {format}: leave it out")
    if not isinstance(checkpoint.format, Unquantized):
        given = {"rule": rule, "ignore": ignore, "only": only}
        for name, value in given.items():
            if value:
                raise ValueError(
                    f"{checkpoint.path} is MXFP8 already ({checkpoint.format.name}): its codes and scales stay as they "
                    f"are, so leave {name} out"
                )
    return Options(WRITABLE.get(format), rule or "rceil", ignore, only, dtype or checkpoint.dtype)


def _documents(checkpoint: Checkpoint, options: Options, planned: Plan) -> dict[str, Any]:
    """Names and contents of the files in JSON that are made anew."""
    if options.format is None:
        made = companions.config(checkpoint.config, None, options.dtype)
        return {CONFIG: made} if made else {}
    quantization = options.format.config(planned.unquantized)
    check_says(options.format, quantization, planned.steps)
    made = companions.config(checkpoint.config, quantization, None)
    return {CONFIG: made, **options.format.documents(planned.unquantized)}


def _state(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """By which a change of the source is noticed."""
    found = [(path, path.stat()) for path in checkpoint.files.paths]
    return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _fingerprint(state: object, options: Options, shards: list[Shard[Step]], documents: dict[str, Any]) -> str:
    """Of all that the output depends on."""
    headers = [(shard.name, shard.header().hex()) for shard in shards]
    return hashlib.sha256(json.dumps([__version__, state, options.rule, headers, documents]).encode()).hexdigest()


def _write(
    draft: Draft, shards: list[Shard[Step]], checkpoint: Checkpoint, progress: bool | None
) -> tuple[dict[str, Row], int]:
    """Writes what an earlier run has not; a row for each step, by the name of its first tensor, and how many shards
    were there.
    """
    finished = {shard.name: reports for shard in shards if (reports := draft.finished(shard)) is not None}
    missing = sum(shard.nbytes for shard in shards if shard.name not in finished)
    free = shutil.disk_usage(draft.folder).free
    if missing > free:
        raise OSError(errno.ENOSPC, f"{missing:,} bytes are to be written, {free:,} are free", str(draft.target))
    rows = {}
    with _bar(shards, "converting", progress) as bar:

        def produce(step: Step) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
            tensors, error = step.run(checkpoint.files)
            bar.update(sum(info.nbytes for info in step.outputs))
            before, after = (sum(info.nbytes for info in each) for each in (step.inputs, step.outputs))
            ratio, lost = (None, 0) if error is None else (error.decibels, error.not_finite)
            row = Row(step.name, step.shape, step.action, step.reason, before, after, ratio, lost)
            return tensors, dataclasses.asdict(row)

        for shard in shards:
            reports = finished.get(shard.name)
            if reports is None:
                reports = draft.write(shard, produce)
            else:
                bar.update(shard.nbytes)
            for step, report in zip(shard.parts, reports, strict=True):
                rows[step.outputs[0].name] = Row(**{**report, "shape": tuple(report["shape"])})
    return rows, len(finished)


def _complete(
    draft: Draft, shards: list[Shard[Step]], documents: dict[str, Any], others: list[companions.Companion]
) -> None:
    """Adds all that is no tensor."""
    draft.keep_only(shards)
    companions.copy(others, draft.folder)
    for name, content in documents.items():
        write_json(draft.folder / name, content)


def _bar(shards: list[Shard[Step]], what: str, progress: bool | None) -> Any:
    total = sum(shard.nbytes for shard in shards)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if progress is None else not progress)
