"""Formats 3, 4 and 5: transformers' fine-grained FP8 with blocks of MX, and what MiniMax and DeepSeek publish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...format import BLOCK_SIZE
from ..documents import Json
from ..errors import CheckpointError
from ..files import TensorFiles
from ..headers import TensorInfo
from ..layer import ELEMENT
from ..layouts import Layout, SharedByRows
from ..names import modules
from .base import Description, Format, Names, as_list

_E8M0_IS = ("ue8m0", None)  # scale_fmt; where the config does not say it, the dtype of the scales must


def _ignored(config: Json) -> list[str]:
    return as_list(config, "ignored_layers", "modules_to_not_convert")


def _matches(found: Description, method: str, block: list[int], default: Any = None) -> bool:
    config = found.quantization
    return (
        config is not None
        and found.method == method
        and (config.get("weight_block_size") or default) == block
        and config.get("scale_fmt") in _E8M0_IS
    )


@dataclass(frozen=True, repr=False)
class HfMxfp8(Format):
    """Format 3, ``quant_method: mxfp8``. In spite of their name, the weight is multiplied by its ``scale_inv``."""

    name: ClassVar[str] = "mxfp8"
    names: ClassVar[tuple[Names, ...]] = (Names(".weight", ".weight_scale_inv"), Names("", "_scale_inv"))
    scale_dtypes: ClassVar[tuple[str, ...]] = ("U8", "F8_E8M0")
    ignore: list[str] = field(default_factory=list)

    @classmethod
    def match(cls, found: Description) -> HfMxfp8 | None:
        matches = _matches(found, "mxfp8", [1, BLOCK_SIZE], default=[1, BLOCK_SIZE])
        return cls(_ignored(found.quantization or {})) if matches else None

    def quantized(self, layer: str) -> bool | None:
        return False if modules(layer, self.ignore) else None

    @classmethod
    def config(cls, unquantized: list[str]) -> Json:
        """``quantization_config`` of a checkpoint in this format whose linears are MXFP8 but for ``unquantized``."""
        return {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, BLOCK_SIZE],
            "scale_fmt": "ue8m0",
            "ignored_layers": sorted(unquantized),
            "modules_to_not_convert": sorted(unquantized),
        }


@dataclass(frozen=True, repr=False)
class Fp8Blocks(HfMxfp8):
    """Format 4, ``quant_method: fp8`` with ``weight_block_size: [1, 32]``."""

    name: ClassVar[str] = "fp8-1x32"

    @classmethod
    def match(cls, found: Description) -> Fp8Blocks | None:
        return cls(_ignored(found.quantization or {})) if _matches(found, "fp8", [1, BLOCK_SIZE]) else None

    @classmethod
    def config(cls, unquantized: list[str]) -> Json:
        shared = super().config(unquantized)
        del shared["ignored_layers"]
        return {**shared, "quant_method": "fp8"}


@dataclass(frozen=True, repr=False)
class Fp8SquareBlocks(HfMxfp8):
    """Format 5, ``quant_method: fp8`` with ``weight_block_size: [32, 32]``: 32 rows share their scales. DeepSeek calls
    them ``<layer>.scale``, as it does other things, so that the dtype of the weight decides what is one.
    """

    name: ClassVar[str] = "fp8-32x32"
    plain_scale: ClassVar[Names] = Names(".weight", ".scale")

    @classmethod
    def match(cls, found: Description) -> Fp8SquareBlocks | None:
        matches = _matches(found, "fp8", [BLOCK_SIZE, BLOCK_SIZE])
        return cls(_ignored(found.quantization or {})) if matches else None

    def layout(self, layer: str) -> Layout:
        return SharedByRows(BLOCK_SIZE)

    def pairs(self, files: TensorFiles) -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
        yield from super().pairs(files)
        for info in files.values():
            layer = info.name.removesuffix(self.plain_scale.scale)
            weight = files.infos.get(layer + self.plain_scale.weight)
            if layer == info.name or weight is None:
                continue
            if weight.dtype == ELEMENT:
                yield layer, weight, info
            elif weight.dtype == "I8":
                raise CheckpointError(f"{weight} is FP4, two elements a byte (expert_dtype fp4), which is not MXFP8")
