"""Format 9: what Huawei's ModelSlim writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ..documents import MODELSLIM_DESCRIPTION, Json
from ..errors import CheckpointError, listed
from ..files import TensorFiles
from ..headers import TensorInfo
from ..layer import LayerSource
from .base import Description, Format, Names

W8A8_MXFP8, FLOAT = "W8A8_MXFP8", "FLOAT"


@dataclass(frozen=True, repr=False)
class ModelSlim(Format):
    """Format 9: quant_model_description.json has the type of each tensor. K may be no multiple of 32: the last block of
    a row is shorter then.
    """

    name: ClassVar[str] = "modelslim"
    names: ClassVar[tuple[Names, ...]] = (Names(".weight", ".weight_scale"),)
    types: Json = field(default_factory=dict)

    @classmethod
    def match(cls, found: Description) -> ModelSlim | None:
        types = found.tensor_types
        return cls(types) if types is not None and W8A8_MXFP8 in types.values() else None

    def quantized(self, layer: str) -> bool | None:
        return self.types.get(f"{layer}.weight") == W8A8_MXFP8

    def pairs(self, files: TensorFiles) -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
        others = {
            f"{info.name} ({said})"
            for info in files.values()
            if (said := self.types.get(info.name, FLOAT)) not in (FLOAT, W8A8_MXFP8)
        }
        if others:
            raise CheckpointError(f"tensors of types that are not MXFP8: {listed(others)}")
        yield from super().pairs(files)

    def check_complete(self, sources: dict[str, LayerSource], files: TensorFiles) -> None:
        super().check_complete(sources, files)
        named = {name for name, said in self.types.items() if said == W8A8_MXFP8 and name.endswith(".weight")}
        missing = named - {source.weight.name for source in sources.values()}
        if missing:
            raise CheckpointError(
                f"{MODELSLIM_DESCRIPTION} says {W8A8_MXFP8} of weights that are missing or have no scales: "
                f"{listed(missing)}"
            )
