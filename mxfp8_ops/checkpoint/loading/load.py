"""``load_into``: the tensors of a checkpoint into a model, one at a time, and the model changed only at the end."""

from __future__ import annotations

import torch
from torch import nn
from tqdm.auto import tqdm

from ... import settings
from ...convert import LayerSummary
from ...format import check_compute_dtype
from ..reading import Checkpoint
from .parallel import TensorParallel
from .placing import FUSED, Fused, Rename, place
from .putting import put
from .streaming import Device, Loaded, Stream, why_dense


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    dequant_at_load: bool | None = None,
    device: Device = None,
    *,
    dtype: torch.dtype | None = None,
    parallel: TensorParallel | None = None,
    fuse: Fused = FUSED,
    rename: Rename | None = None,
    progress: bool | None = None,
) -> list[LayerSummary]:
    """Loads ``checkpoint`` into ``model``: its MXFP8 layers become ``Mxfp8Linear``, all others stay what they are.

    Tensors are read one at a time. Of a model on the meta device memory never exceeds the loaded model by more than one
    tensor; of one that has tensors already, these stay until the end. Either all is loaded, or, after an error, the
    model is as before.

    Args:
        model: whose parameters and buffers have the names of the checkpoint's, or are made of some of these: see
            ``fuse``. Its tensors may be on the meta device. It may hold ``nn.Linear`` or ``Mxfp8Linear``.
        checkpoint: from ``open_checkpoint``.
        dequant_at_load: with True MXFP8 layers are dequantized, one after the other, and stay ``nn.Linear``. Beats
            ``MXFP8_DEQUANT_AT_LOAD`` unless None; unset there means False here.
        device: for all that is loaded; None for where the model's tensors are, the CPU if that is meta.
        dtype: for floating-point tensors that are not MXFP8, and for dequantized weights: float32, bfloat16 or float16.
            None leaves the former as they are stored and makes the latter what config.json says, or else bfloat16.
        parallel: splits linears over the ranks of a process group.
        fuse: modules that the model has as one and the checkpoint in parts, such as ``qkv_proj``, with the names of the
            parts in order. Experts that are one parameter ``[E, N, K]`` in the model are stacked likewise.
        rename: from names in the checkpoint to names in the model; None for a tensor that is to be left out.
        progress: a bar on stderr; None for one where that is a terminal.

    Returns:
        One entry for each MXFP8 layer of the model: "kept", or "dequantized" with the reason.

    Raises:
        CheckpointError (a ValueError): a tensor is missing, there is none for it in the model, a shape differs, or a
        file cannot be read. ValueError: a buffer that no checkpoint has is on the meta device, or a layer cannot be
        split. TypeError: dtype.
    """
    if dtype is not None:
        check_compute_dtype(dtype, "dtype")
    dequantize = settings.dequant_at_load(dequant_at_load) is True
    targets = place(model, checkpoint, fuse, rename)
    reasons = why_dense(model, targets, dequantize)
    stream = Stream(model, checkpoint, reasons, device, dtype, parallel)
    sizes = [(target, stream.check(target)) for target in stream.in_order(targets)]
    quiet = None if progress is None else not progress
    loaded = []
    with tqdm(total=sum(size for _, size in sizes), unit="B", unit_scale=True, disable=quiet) as bar:
        for target, size in sizes:
            loaded.append(stream.load(target))
            bar.update(size)
    put(model, loaded, parallel)
    return [_summary(each, reasons[each.target.name]) for each in loaded if each.target.quantized]


def _summary(loaded: Loaded, why: str) -> LayerSummary:
    target = loaded.target
    before = sum(piece.nbytes for piece in target.pieces)
    name, action = target.name.removesuffix(".weight"), "dequantized" if why else "kept"
    return LayerSummary(name, target.shape, action, why, before, loaded.nbytes)
