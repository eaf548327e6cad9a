"""Formats 6 and 7: compressed-tensors, as llm-compressor writes it, and AutoRound, which exports the same tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...format import BLOCK_SIZE
from ..documents import Json
from ..errors import CheckpointError
from ..names import names_or_regexes, regex
from .base import Description, Format, Names, as_list

FORMAT, MIXED = "mxfp8-quantized", "mixed-precision"
_WEIGHTS = {"num_bits": 8, "type": "float", "group_size": BLOCK_SIZE}


def _is_mxfp8(group: Any, format_of_all: Any) -> bool:
    """Whether a group of layers has MXFP8 weights: all of the facts that compressed-tensors tells it by."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        return False
    weights = group["weights"]
    return (
        (group.get("format") or format_of_all) == FORMAT
        and all(weights.get(key) == value for key, value in _WEIGHTS.items())
        and weights.get("strategy", "group") == "group"
        and weights.get("scale_dtype", "torch.uint8") in ("torch.uint8", "uint8")
    )


@dataclass(frozen=True, repr=False)
class CompressedTensors(Format):
    """Format 6, ``quant_method: compressed-tensors`` with ``format: mxfp8-quantized``, or groups of that format."""

    name: ClassVar[str] = "compressed-tensors"
    names: ClassVar[tuple[Names, ...]] = (Names(".weight", ".weight_scale"),)
    ignore: list[str] = field(default_factory=list)

    @classmethod
    def match(cls, found: Description) -> CompressedTensors | None:
        config = found.quantization
        if config is None or found.method != cls.name or config.get("format") not in (FORMAT, MIXED):
            return None
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"compressed-tensors needs an object config_groups, got {groups!r:.80}")
        others = [name for name, group in groups.items() if not _is_mxfp8(group, config["format"])]
        if len(others) == len(groups):
            return None
        if others:
            raise CheckpointError(
                f"groups of compressed-tensors that are not MXFP8 in blocks of 32: {', '.join(others)}"
            )
        return cls(as_list(config, "ignore"))

    def quantized(self, layer: str) -> bool | None:
        return False if names_or_regexes(layer, self.ignore) else None

    @classmethod
    def config(cls, unquantized: list[str]) -> Json:
        """``quantization_config`` of a checkpoint in this format whose linears are MXFP8 but for ``unquantized``."""
        weights = {
            **_WEIGHTS,
            "strategy": "group",
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted(unquantized),
            "kv_cache_scheme": None,
        }


@dataclass(frozen=True, repr=False)
class AutoRound(Format):
    """Format 7, ``quant_method: auto-round`` packed for llm-compressor; ``extra_config`` names layers of other bits."""

    name: ClassVar[str] = "auto-round"
    names: ClassVar[tuple[Names, ...]] = CompressedTensors.names
    extra: Json = field(default_factory=dict)

    @classmethod
    def match(cls, found: Description) -> AutoRound | None:
        config = found.quantization
        if config is None or found.method not in ("auto-round", "intel/auto-round", "inc"):
            return None
        if config.get("packing_format") != "auto_round:llm_compressor" or not cls._is_mxfp8(config):
            return None
        extra = config.get("extra_config") or {}
        if not isinstance(extra, dict) or not all(isinstance(each, dict) for each in extra.values()):
            raise CheckpointError(f"extra_config must be an object of objects, got {extra!r:.80}")
        return cls({name: cls._is_mxfp8({**config, **each}) for name, each in extra.items()})

    @staticmethod
    def _is_mxfp8(config: Json) -> bool:
        return (
            config.get("bits") == 8
            and config.get("group_size") == BLOCK_SIZE
            and config.get("data_type") in ("mx_fp", "mx_fp_rceil", "mx_fp8", "mx_fp8e4m3")
        )

    def quantized(self, layer: str) -> bool | None:
        if layer in self.extra:
            return bool(self.extra[layer])
        said = [quantized for pattern, quantized in self.extra.items() if _fully(pattern, layer)]
        return said[0] if said else None


def _fully(pattern: str, layer: str) -> bool:
    try:
        return regex(pattern).fullmatch(layer) is not None
    except CheckpointError:  # a name that is no regular expression
        return False
