"""Format 11: torchao's MXTensor, flattened into safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...format import BLOCK_SIZE
from ..documents import Json
from ..errors import CheckpointError, listed
from ..files import TensorFiles
from ..headers import TensorInfo
from ..layouts import Layout, RowMajor, Swizzled
from .base import Description, Format, Names

_ELEMENT = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}


def subclasses(files: TensorFiles) -> dict[str, Json]:
    """Name and attributes of each tensor that the metadata says is not a plain one."""
    described = {}
    for name, text in files.metadata.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue  # other metadata, such as {"format": "pt"}
        if isinstance(value, dict) and value.get("_type") not in (None, "Tensor"):
            described[name] = value
    return described


@dataclass(frozen=True, repr=False)
class TorchAO(Format):
    """Format 11, ``quant_method: torchao``: metadata of the files has the attributes of each MXTensor, of which some
    say whether its scales are swizzled; they have been called by two names.
    """

    name: ClassVar[str] = "torchao"
    names: ClassVar[tuple[Names, ...]] = (Names("._weight_qdata", "._weight_scale"),)
    scale_dtypes: ClassVar[tuple[str, ...]] = ("F8_E8M0", "U8")
    swizzled: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def match(cls, found: Description) -> TorchAO | None:
        if found.method != cls.name:
            return None
        described = subclasses(found.files)
        others = {f"{name} ({value['_type']})" for name, value in described.items() if value["_type"] != "MXTensor"}
        if len(others) == len(described):
            return None
        if others:
            raise CheckpointError(f"torchao's MXTensor is read, other kinds are not: {listed(others)}")
        contradictory = described.keys() & found.files.disagreeing
        if contradictory:
            raise CheckpointError(f"the metadata of the files does not agree on {listed(contradictory)}")
        return cls({_layer(name): _is_swizzled(name, value.get("_data")) for name, value in described.items()})

    def quantized(self, layer: str) -> bool | None:
        return layer in self.swizzled

    def layout(self, layer: str) -> Layout:
        return Swizzled() if self.swizzled.get(layer) else RowMajor()

    def pairs(self, files: TensorFiles) -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
        for layer in self.swizzled:
            module, _, parameter = layer.rpartition(".")
            flat = f"{layer}._weight" if f"{layer}._weight_qdata" in files else f"{module}._{parameter}"
            weight, scale = files.infos.get(f"{flat}_qdata"), files.infos.get(f"{flat}_scale")
            if weight is None or scale is None:
                missing = [part for part in (f"{flat}_qdata", f"{flat}_scale") if part not in files]
                raise CheckpointError(f"the metadata names {layer}, but there is no {listed(missing)}")
            yield layer, weight, scale


def _layer(name: str) -> str:
    """Of ``M.weight`` the module M; of experts in one parameter the parameter itself."""
    return name.removesuffix(".weight")


def _is_swizzled(name: str, attributes: Any) -> bool:
    """Whether the scales are swizzled, by the tensor's own attributes, not by those of its activations."""
    if not isinstance(attributes, dict):
        raise CheckpointError(f"the metadata of {name} has no attributes (_data)")
    if attributes.get("elem_dtype") != _ELEMENT or attributes.get("block_size") != BLOCK_SIZE:
        raise CheckpointError(
            f"{name} must have elements of float8_e4m3fn in blocks of {BLOCK_SIZE}, its metadata says "
            f"{attributes.get('elem_dtype')} and {attributes.get('block_size')}"
        )
    said = [attributes[key] for key in ("is_swizzled_scales", "swizzle_type") if attributes.get(key) is not None]
    match [each.get("_type") if isinstance(each, dict) else each for each in said]:
        case [False] | ["NoSwizzle"]:
            return False
        case [True] | ["Swizzle_32_4_4"]:
            return True
    raise CheckpointError(f"the metadata of {name} must say whether its scales are swizzled, it says {said!r:.200}")
