"""Format 10: a single file for ComfyUI."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from ..documents import Json
from ..errors import CheckpointError, listed
from ..files import TensorFiles
from ..layer import LayerSource
from ..layouts import Layout, Swizzled
from .base import Description, Format, Names

MARKER = ".comfy_quant"
METADATA = "_quantization_metadata"
_LONGEST = 1 << 16  # bytes of JSON in a marker, which has a few dozen


def _parsed(text: str, where: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {value!r:.80}")
    return value


def layer_formats(files: TensorFiles) -> Json:
    """The format of each layer that a marker tensor or the file's metadata names.

    Raises:
        CheckpointError: they are not the JSON that they should be, or contradict each other.
    """
    said: Json = {}
    if METADATA in files.metadata:
        layers = _parsed(files.metadata[METADATA], METADATA).get("layers")
        if not isinstance(layers, dict) or METADATA in files.disagreeing:
            raise CheckpointError(f"{METADATA} must have an object layers, the same in all files, got {layers!r:.80}")
        said = {layer: each.get("format") if isinstance(each, dict) else each for layer, each in layers.items()}
    for info in files.values():
        if not info.name.endswith(MARKER):
            continue
        if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > _LONGEST:
            raise CheckpointError(f"{info} must be the bytes of some JSON")
        marked = _parsed(bytes(files.read(info.name).tolist()).decode("utf-8", "replace"), str(info)).get("format")
        layer = info.name.removesuffix(MARKER)
        if said.setdefault(layer, marked) != marked:
            raise CheckpointError(f"{info} says {marked!r:.80}, but {METADATA} {said[layer]!r:.80}")
    return said


@dataclass(frozen=True, repr=False)
class ComfyUI(Format):
    """Format 10: a tensor ``<layer>.comfy_quant`` or the file's metadata says ``mxfp8``, and that the scales are
    swizzled, which their shape does not tell.
    """

    name: ClassVar[str] = "comfyui"
    names: ClassVar[tuple[Names, ...]] = (Names(".weight", ".weight_scale"),)
    scale_dtypes: ClassVar[tuple[str, ...]] = ("U8", "F8_E8M0")
    formats: Json = field(default_factory=dict)

    @classmethod
    def match(cls, found: Description) -> ComfyUI | None:
        said = layer_formats(found.files)
        return cls(said) if "mxfp8" in said.values() and not found.places else None

    def quantized(self, layer: str) -> bool | None:
        return any(_is(layer, name) for name in self.formats)

    def layout(self, layer: str) -> Layout:
        return Swizzled()

    def layers(self, files: TensorFiles) -> dict[str, LayerSource]:
        others = {f"{name} ({said})" for name, said in self.formats.items() if said != "mxfp8"}
        if others:
            raise CheckpointError(f"layers that are quantized otherwise than MXFP8: {listed(others)}")
        sources = super().layers(files)
        missing = {name for name in self.formats if not any(_is(layer, name) for layer in sources)}
        if missing:
            raise CheckpointError(f"layers that are said to be MXFP8, but have no such tensors: {listed(missing)}")
        return sources


def _is(layer: str, name: str) -> bool:
    """Whether the metadata means ``layer`` by ``name``: there it may lack the first components."""
    return f".{layer}".endswith(f".{name}")
