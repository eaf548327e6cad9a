"""``open_checkpoint``: a folder or a file as a mapping from layers to their MXFP8 weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..format import COMPUTE_DTYPES
from . import formats
from .documents import CONFIG, MODELOPT_CONFIG, MODELSLIM_DESCRIPTION, Json, read_json
from .errors import CheckpointError
from .files import TensorFiles, open_files
from .formats import Description, Format
from .layer import LayerSource, Mxfp8Weight


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Mxfp8Weight]):
    """An MXFP8 checkpoint, opened: names of layers to ``(weight, scale, bias)``, which are read when asked for.

    Attributes:
        path: the folder or the file.
        config: config.json as it is, empty without one.
        format: the dialect it is in.
        files: every tensor's header, by name; ``files.read(name)`` has the values.
        sources: the MXFP8 layers, by name, checked against the headers.
        plain: names of the tensors that belong to none of these layers.
    """

    path: Path
    config: Json
    format: Format
    files: TensorFiles
    sources: dict[str, LayerSource]
    plain: tuple[str, ...]

    def __getitem__(self, layer: str) -> Mxfp8Weight:
        if layer not in self.sources:
            raise KeyError(f"{self.path} has no MXFP8 layer {layer!r}")
        return self.sources[layer].read(self.files)

    def __contains__(self, layer: object) -> bool:  # Mapping's own would read the layer
        return layer in self.sources

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model, as config.json says, bfloat16 where it does not."""
        names = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}
        for config in (self.config, self.config.get("text_config")):
            name = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
            if isinstance(name, str) and name in names:
                return names[name]
        return torch.bfloat16

    def fused(self, layers: Sequence[str]) -> Mxfp8Weight:
        """Layers on the same x as one, along N: q, k and v, or gate and up. Blocks run along K, so no value changes.

        Raises:
            KeyError: no such layer. ValueError: they differ in K, or some have a bias and others none.
        """
        return concatenated([self[layer] for layer in layers], layers)

    def __repr__(self) -> str:
        return (
            f"<Checkpoint {self.path} ({self.format.name}): {len(self)} MXFP8 layers, {len(self.plain)} other tensors>"
        )


def concatenated(parts: Sequence[Mxfp8Weight], layers: Sequence[str]) -> Mxfp8Weight:
    """Weights ``[..., N_i, K]`` of ``layers`` as one ``[..., sum of N_i, K]``, see ``Checkpoint.fused``."""
    if len({part.weight.shape[:-2] + part.weight.shape[-1:] for part in parts}) != 1:
        raise ValueError(f"layers of different K cannot be fused: {shapes(parts, layers)}")
    biases = [part.bias for part in parts if part.bias is not None]
    if len(biases) not in (0, len(parts)):
        raise ValueError(f"layers with and without a bias cannot be fused: {', '.join(layers)}")
    weight = torch.cat([part.weight.view(torch.uint8) for part in parts], -2).view(parts[0].weight.dtype)
    return Mxfp8Weight(weight, torch.cat([part.scale for part in parts], -2), torch.cat(biases, -1) if biases else None)


def shapes(parts: Sequence[Mxfp8Weight], layers: Sequence[str]) -> str:
    return ", ".join(f"{layer} {list(part.weight.shape)}" for layer, part in zip(layers, parts, strict=True))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens an MXFP8 checkpoint: reads its configs and the headers of its files, and no values.

    Args:
        path: a folder with config.json or hf_quant_config.json and one or many .safetensors files, with an index or
            without, or a single such file. Unquantized checkpoints open as well, without layers.

    Raises:
        CheckpointError (a ValueError): the format is unknown, or what the checkpoint says contradicts its tensors; a
        file is missing, damaged or a pickle; a tensor is missing, there twice, or of a wrong dtype or shape. The
        message names file and tensor.
    """
    path = Path(path)
    files = open_files(path)
    folder = path if path.is_dir() else path.parent
    config = _json(folder / CONFIG) or {}
    try:
        found = described(folder, _object(config, CONFIG, "quantization_config", "compression_config"), files)
        format = formats.find(found)
        sources = format.layers(files)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    of_layers = {name for source in sources.values() for name in source.names}
    plain = tuple(name for name in files if name not in of_layers)
    return Checkpoint(path, config, format, files, sources, plain)


def described(folder: Path, quantization: Json | None, files: TensorFiles) -> Description:
    """What ``folder`` says beside ``quantization``, the config of its config.json, with the headers of ``files``."""
    modelopt = _object(_json(folder / MODELOPT_CONFIG) or {}, MODELOPT_CONFIG, "quantization")
    return Description(quantization, modelopt, _json(folder / MODELSLIM_DESCRIPTION), files)


def _json(path: Path) -> Json | None:
    return read_json(path) if path.exists() or path.is_symlink() else None


def _object(config: Json, file: str, *keys: str) -> Json | None:
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is not None and not isinstance(config[key], dict):
        raise CheckpointError(f"{file}: {key} must be an object, got {config[key]!r:.80}")
    return None if key is None else config[key]
