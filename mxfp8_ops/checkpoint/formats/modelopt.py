"""Formats 1 and 2: what NVIDIA's ModelOpt writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...format import BLOCK_SIZE
from ..documents import CONFIG, MODELOPT_CONFIG, Json
from ..errors import CheckpointError, listed
from ..files import TensorFiles
from ..layer import LayerSource
from ..names import wildcards
from .base import Description, Format, Names, as_list

MXFP8, MIXED = "MXFP8", "MIXED_PRECISION"
PRODUCER = {"name": "mxfp8-ops"}


def _algorithm(config: Json) -> Any:
    """``quant_algo``; older exporters wrote it in lower case."""
    name = config.get("quant_algo")
    return name.upper() if isinstance(name, str) else name


def _group_size(config: Json) -> Any:
    """``group_size``, which config.json leaves out."""
    size = config.get("group_size")
    return BLOCK_SIZE if size is None else size


def _of_layers(config: Json) -> dict[str, tuple[Any, Any]]:
    """Algorithm and group size of each of the ``quantized_layers``."""
    layers = config.get("quantized_layers")
    if layers is None:
        return {}
    if not isinstance(layers, dict) or not all(isinstance(each, dict) for each in layers.values()):
        raise CheckpointError(f"quantized_layers must be an object of objects with quant_algo, got {layers!r:.80}")
    return {name: (_algorithm(each), _group_size(each)) for name, each in layers.items()}


def _ignored(found: Description) -> list[str]:
    """Of both files: they say the same, or a layer that only one of them names is looked at."""
    said = [_said(found) or {}, found.modelopt or {}]
    return sorted({name for config in said for name in as_list(config, "ignore", "exclude_modules")})


def _said(found: Description) -> Json | None:
    """What ModelOpt says, in config.json or in the older hf_quant_config.json; None where it says nothing.

    Raises:
        CheckpointError: the two files name different algorithms or sizes of groups, of all layers or of one.
    """
    inside = found.quantization if found.method == "modelopt" else None
    if inside is not None and isinstance(inside.get("quantization"), dict):
        inside = inside["quantization"]  # the old form, moved into config.json
    if inside is None:
        return found.modelopt if found.quantization is None else None
    if found.modelopt is not None:
        for what, of in (("quant_algo", _algorithm), ("group_size", _group_size), ("quantized_layers", _of_layers)):
            one, other = of(inside), of(found.modelopt)
            if one != other:
                raise CheckpointError(f"{what} is {one!r:.200} in {CONFIG}, {other!r:.200} in {MODELOPT_CONFIG}")
    return inside


@dataclass(frozen=True, repr=False)
class ModelOpt(Format):
    """Format 1, ``quant_algo: MXFP8``: every linear that ``ignore`` (older: ``exclude_modules``) does not name."""

    name: ClassVar[str] = "modelopt"
    names: ClassVar[tuple[Names, ...]] = (Names(".weight", ".weight_scale"), Names("", "_weight_scale"))
    ignore: list[str] = field(default_factory=list)

    @classmethod
    def match(cls, found: Description) -> ModelOpt | None:
        said = _said(found)
        if said is None or _algorithm(said) != MXFP8 or _group_size(said) != BLOCK_SIZE:
            return None
        return cls(_ignored(found))

    def quantized(self, layer: str) -> bool | None:
        return False if wildcards(layer, self.ignore) else None

    @classmethod
    def config(cls, unquantized: list[str]) -> Json:
        """``quantization_config`` of a checkpoint in this format whose linears are MXFP8 but for ``unquantized``."""
        return {
            "quant_method": "modelopt",
            "quant_algo": MXFP8,
            "ignore": sorted(unquantized),
            "producer": PRODUCER,
        }

    @classmethod
    def documents(cls, unquantized: list[str]) -> dict[str, Json]:
        """The older file, which some servers read."""
        said = {
            "quant_algo": MXFP8,
            "kv_cache_quant_algo": None,
            "group_size": BLOCK_SIZE,
            "exclude_modules": sorted(unquantized),
        }
        return {MODELOPT_CONFIG: {"producer": PRODUCER, "quantization": said}}


@dataclass(frozen=True, repr=False)
class ModelOptMixed(Format):
    """Format 2, ``quant_algo: MIXED_PRECISION``: ``quantized_layers`` has the algorithm of each layer."""

    name: ClassVar[str] = "modelopt-mixed"
    names: ClassVar[tuple[Names, ...]] = ModelOpt.names
    algorithms: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)

    @classmethod
    def match(cls, found: Description) -> ModelOptMixed | None:
        said = _said(found)
        if said is None or _algorithm(said) != MIXED:
            return None
        if said.get("quantized_layers") is None:
            raise CheckpointError("quant_algo MIXED_PRECISION needs an object quantized_layers: {name: {quant_algo}}")
        return cls(_of_layers(said), _ignored(found))

    def quantized(self, layer: str) -> bool | None:
        return layer in self.algorithms and not wildcards(layer, self.ignore)

    def layers(self, files: TensorFiles) -> dict[str, LayerSource]:
        others = {
            f"{name} ({algorithm} in blocks of {size})"
            for name, (algorithm, size) in self.algorithms.items()
            if (algorithm, size) != (MXFP8, BLOCK_SIZE)
        }
        if others:
            raise CheckpointError(f"layers that are quantized otherwise than MXFP8 in blocks of 32: {listed(others)}")
        sources = super().layers(files)
        missing = self.algorithms.keys() - sources.keys()
        if missing:
            raise CheckpointError(f"quantized_layers names layers that have no tensors in MXFP8: {listed(missing)}")
        return sources
