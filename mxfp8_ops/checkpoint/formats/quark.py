"""Format 8: what AMD's Quark writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...format import BLOCK_SIZE
from ..errors import CheckpointError
from ..layouts import Layout, RowMajor, SharedByRows
from ..names import names_or_regexes, wildcards
from .base import Description, Format, Names, as_list

_E8M0 = ("e8m0", "float8_e8m0fnu")


def _layout(config: Any) -> Layout | None:
    """The layout of the scales under one layer's config, None where its weight is not MXFP8."""
    weight = config.get("weight") if isinstance(config, dict) else None
    if isinstance(weight, list) and len(weight) == 1:
        weight = weight[0]
    if not isinstance(weight, dict) or weight.get("dtype") != "fp8_e4m3":
        return None
    if weight.get("scale_format") not in _E8M0 and weight.get("scale_type") not in _E8M0:
        return None
    if weight.get("qscheme") == "per_group" and weight.get("group_size") == BLOCK_SIZE:
        return RowMajor()
    match weight.get("qscheme"), weight.get("block_size"):
        case "per_block", [int(rows), int(columns)] if rows > 0 and columns == BLOCK_SIZE:
            return SharedByRows(rows)
    return None


def _means(layer: str, patterns: list[str]) -> bool:
    """Whether one of ``patterns`` names the layer: whole, with wildcards, or as a regular expression after ``re:``."""
    return wildcards(layer, patterns) or names_or_regexes(layer, patterns)


@dataclass(frozen=True, repr=False)
class Quark(Format):
    """Format 8: groups of 32 elements, or blocks of R rows by 32 elements; ``layer_quant_config`` for some layers."""

    name: ClassVar[str] = "quark"
    names: ClassVar[tuple[Names, ...]] = (Names(".weight", ".weight_scale"),)
    scale_dtypes: ClassVar[tuple[str, ...]] = ("U8", "F8_E8M0")
    everywhere: Layout | None = None
    somewhere: dict[str, Layout | None] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)

    @classmethod
    def match(cls, found: Description) -> Quark | None:
        config = found.quantization
        if config is None or found.method != cls.name:
            return None
        layers = config.get("layer_quant_config") or {}
        if not isinstance(layers, dict):
            raise CheckpointError(f"layer_quant_config must be an object, got {layers!r:.80}")
        everywhere = _layout(config.get("global_quant_config"))
        somewhere = {pattern: _layout(each) for pattern, each in layers.items()}
        if everywhere is None and not any(somewhere.values()):
            return None
        return cls(everywhere, somewhere, as_list(config, "exclude"))

    def _said(self, layer: str) -> Layout | None:
        if layer in self.somewhere:
            return self.somewhere[layer]
        return next((each for pattern, each in self.somewhere.items() if _means(layer, [pattern])), self.everywhere)

    def quantized(self, layer: str) -> bool | None:
        return False if _means(layer, self.exclude) or self._said(layer) is None else None

    def layout(self, layer: str) -> Layout:
        return self._said(layer) or RowMajor()
