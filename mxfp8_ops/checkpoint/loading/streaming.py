"""The values of a model's tensors, read from a checkpoint piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...convert import dequant_bounded, linears_to_leave
from ...format import BLOCK_SIZE
from ...nn import Mxfp8Linear
from ..layer import LayerSource
from ..reading import Checkpoint
from ..values import EVERYTHING
from .parallel import COLUMN, ROW, TensorParallel
from .placing import Piece, Target, parent

Device = torch.device | str | None


def why_dense(model: nn.Module, targets: list[Target], dequantize: bool) -> dict[str, str]:
    """For each MXFP8 target why the model is to hold it dequantized, "" where it need not."""
    reasons = {each.name: _why_dense(model, each, dequantize) for each in targets if each.quantized}
    linears: dict[nn.Linear, str] = {}
    for name, reason in reasons.items():
        module = parent(model, name)
        if not reason and isinstance(module, nn.Linear):
            linears[module] = name.removesuffix(".weight")
    for linear, reason in linears_to_leave(model, linears).items():
        reasons[f"{linears[linear]}.weight"] = reason
    return reasons


def _why_dense(model: nn.Module, target: Target, dequantize: bool) -> str:
    module = parent(model, target.name)
    if dequantize:
        return "the flag is on"
    if len(target.shape) != 2:
        return "a parameter of experts, for which there is no MXFP8 module"
    if not target.name.endswith(".weight") or not isinstance(module, nn.Linear | Mxfp8Linear):
        return f"a parameter of {type(module).__name__}"
    if target.shape[1] % BLOCK_SIZE:
        return f"K = {target.shape[1]} is not a multiple of {BLOCK_SIZE}"
    return ""


@dataclass(frozen=True)
class Loaded:
    """A target with the values that this rank has of it.

    Attributes:
        tensor: the values; bytes, where there are scales; None for the bias of a linear that another rank adds.
        scale: ``[N, K/32]`` uint8 of a weight that stays MXFP8.
    """

    target: Target
    tensor: Tensor | None
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.tensor, self.scale) if each is not None)


@dataclass(frozen=True)
class Stream:
    """Reads targets. ``reasons``: from ``why_dense``. Others as in ``load_into``."""

    model: nn.Module
    checkpoint: Checkpoint
    reasons: dict[str, str]
    device: Device
    dtype: torch.dtype | None
    parallel: TensorParallel | None

    def in_order(self, targets: Iterable[Target]) -> list[Target]:
        """``targets`` file by file."""
        positions = {name: position for position, name in enumerate(self.checkpoint.files)}
        return sorted(targets, key=lambda target: positions[target.pieces[0].names[0]])

    def check(self, target: Target) -> int:
        """How many bytes are to be read for ``target``; ValueError where it cannot be split over the ranks."""
        for piece in target.pieces:
            self._part(target, piece)
        return sum(piece.nbytes for piece in target.pieces)

    def load(self, target: Target) -> Loaded:
        """The values of ``target``, read piece by piece, on the device where they are to stay."""
        rows, pieces = self._rows(target), target.pieces
        if self._bias_of_another_rank(target):
            return Loaded(target, None)
        if target.quantized and not self.reasons[target.name]:
            weight, scale = self._joined(target, rows, (self._bytes(target, piece) for piece in pieces))
            return Loaded(target, weight, scale)
        (tensor,) = self._joined(target, rows, ((self._dense(target, piece),) for piece in pieces))
        return Loaded(target, tensor if target.experts is None else tensor.view(target.shape))

    def _joined(self, target: Target, rows: int, parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tensors one after the other along their first dimension, in memory that is taken once."""
        device = self._device(target)
        if len(target.pieces) == 1:
            return tuple(tensor.to(device) for tensor in next(parts))
        joined: tuple[Tensor, ...] = ()
        start = 0
        for part in parts:
            joined = joined or tuple(torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device=device) for t in part)
            for whole, tensor in zip(joined, part, strict=True):
                whole[start : start + len(tensor)] = tensor
            start += len(part[0])
        return joined

    def _bytes(self, target: Target, piece: Piece) -> tuple[Tensor, Tensor]:
        """``[n, k]`` and ``[n, k/32]``, both uint8: copying float8 tensors is not implemented everywhere."""
        assert isinstance(piece, LayerSource)
        weight, scale = piece.read_weight(self.checkpoint.files, *self._part(target, piece))
        return weight.view(torch.uint8), scale

    def _dense(self, target: Target, piece: Piece) -> Tensor:
        rows, columns = self._part(target, piece)
        if isinstance(piece, LayerSource):
            weight, scale = piece.read_weight(self.checkpoint.files, rows, columns)
            device, dtype = self._device(target), self.dtype or self.checkpoint.dtype
            dense = dequant_bounded(weight.to(device), scale.to(device), dtype)
            return dense[..., : piece.shape[-1]].contiguous()  # without what fills up K to a multiple of 32
        tensor = self.checkpoint.files.read(piece.name, *(rows, columns)[: len(piece.shape)])
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def _part(self, target: Target, piece: Piece) -> tuple[slice, slice]:
        """The rows and columns of ``piece`` that this rank loads."""
        path, _, kind = target.name.rpartition(".")
        if self.parallel is None or not isinstance(parent(self.model, target.name), nn.Linear | Mxfp8Linear):
            return EVERYTHING, EVERYTHING
        if kind == "weight":
            return self.parallel.part(path, piece.shape, BLOCK_SIZE if isinstance(piece, LayerSource) else 1)
        if self.parallel.style(path) == COLUMN:
            return self.parallel.part(path, (*piece.shape, 1))
        return EVERYTHING, EVERYTHING

    def _bias_of_another_rank(self, target: Target) -> bool:
        """Outputs of a linear that is split along K are summed up, so that one rank only may add the bias."""
        path, _, kind = target.name.rpartition(".")
        return (
            self.parallel is not None and kind == "bias" and self.parallel.style(path) == ROW and self.parallel.rank > 0
        )

    def _rows(self, target: Target) -> int:
        parts = [(self._part(target, piece)[0], piece.shape) for piece in target.pieces]
        return sum(len(range(shape[0])[rows]) for rows, shape in parts if shape)

    def _device(self, target: Target) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        module = parent(self.model, target.name)
        there = next(
            (each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None), None
        )
        return torch.device("cpu") if there is None or there.is_meta else there.device
