"""What formats have in common: a description of the checkpoint to match, and pairing weights with scales by name."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..documents import MODELOPT_CONFIG, MODELSLIM_DESCRIPTION, Json
from ..errors import CheckpointError, listed
from ..files import TensorFiles
from ..headers import TensorInfo
from ..layer import SCALE, SHORT_FLOATS, LayerSource
from ..layouts import Layout, RowMajor


@dataclass(frozen=True)
class Description:
    """All that a checkpoint says about itself beside its tensors.

    Attributes:
        quantization: ``quantization_config`` of config.json, None where it has none.
        modelopt: ``quantization`` of hf_quant_config.json, None without that file.
        tensor_types: quant_model_description.json of ModelSlim, None without that file.
        files: the headers of all tensors.
    """

    quantization: Json | None = None
    modelopt: Json | None = None
    tensor_types: Json | None = None
    files: TensorFiles = field(default_factory=lambda: TensorFiles(Path(), [], {}))

    @property
    def method(self) -> Any:
        """``quant_method`` of the config, None where there is none."""
        return None if self.quantization is None else self.quantization.get("quant_method")

    @property
    def places(self) -> list[str]:
        """Where something is said about quantization."""
        said = {
            "quantization_config": self.quantization,
            MODELOPT_CONFIG: self.modelopt,
            MODELSLIM_DESCRIPTION: self.tensor_types,
        }
        return [place for place, value in said.items() if value is not None]


class Names(NamedTuple):
    """Endings of tensor names: ``<layer><weight>`` has the scales ``<layer><scale>`` and the bias ``<layer>.bias``."""

    weight: str
    scale: str


class Format(abc.ABC):
    """A dialect of MXFP8 on disk. Instances hold what one checkpoint says in it.

    Attributes:
        name: by which users ask for it.
        names: how its tensors are called.
        scale_dtypes: dtypes in which it stores E8M0 bytes, as safetensors names them.
    """

    name: ClassVar[str]
    names: ClassVar[tuple[Names, ...]]
    scale_dtypes: ClassVar[tuple[str, ...]] = ("U8",)

    @classmethod
    @abc.abstractmethod
    def match(cls, found: Description) -> Format | None:
        """This format for what was found, None where it is another one. By exact values, never by parts of words."""

    @classmethod
    def config(cls, unquantized: list[str]) -> Json:
        """``quantization_config`` of a checkpoint in this format whose linears are MXFP8 but for ``unquantized``."""
        raise NotImplementedError(f"{cls.name} is read, but not written")

    @classmethod
    def documents(cls, unquantized: list[str]) -> dict[str, Json]:
        """Names and contents of other files that say the same."""
        return {}

    def quantized(self, layer: str) -> bool | None:
        """Whether the config says that ``layer`` is MXFP8 (True) or not (False); None where its tensors decide."""
        return None

    def layout(self, layer: str) -> Layout:
        """How the scales of ``layer`` are stored."""
        return RowMajor()

    def layers(self, files: TensorFiles) -> dict[str, LayerSource]:
        """The MXFP8 layers, by name, every one checked against the headers of its tensors and against the config.

        Raises:
            CheckpointError: there is none; a scale without a weight or the other way round, two scales for one weight,
            a dtype or shape that does not fit, or tensors that contradict the config.
        """
        sources: dict[str, LayerSource] = {}
        for layer, weight, scale in self.pairs(files):
            bias = files.infos.get(f"{layer}.bias")
            source = LayerSource(layer, weight, scale, bias, self.layout(layer), self.scale_dtypes)
            first = sources.setdefault(layer, source)
            if first is not source:
                raise CheckpointError(f"two tensors claim the layer {layer}: {first.scale} and {scale}")
            source.check()
            if self.quantized(layer) is False:
                raise CheckpointError(f"{scale}: {layer} has scales, but the config says that it is not quantized")
        self.check_complete(sources, files)
        if not sources:
            raise CheckpointError(f"the checkpoint says that it is {self.name}, but no layer in it has scales")
        return sources

    def pairs(self, files: TensorFiles) -> Iterator[tuple[str, TensorInfo, TensorInfo]]:
        """Layer, weight and scale of each tensor that is named like scales."""
        for info in files.values():
            names = next((each for each in self.names if info.name.endswith(each.scale)), None)
            if names is None:
                continue
            layer = info.name.removesuffix(names.scale)
            weight = files.infos.get(layer + names.weight)
            if weight is None:
                raise CheckpointError(f"{info}: there is no {layer + names.weight} that these scales could belong to")
            yield layer, weight, info

    def check_complete(self, sources: dict[str, LayerSource], files: TensorFiles) -> None:
        """Raises CheckpointError where elements have no scales, scales no elements, or one weight has two."""
        claimed: dict[str, str] = {}
        for source in sources.values():
            for name in source.names:
                if claimed.setdefault(name, source.name) != source.name:
                    raise CheckpointError(f"{name} is part of two layers: {claimed[name]} and {source.name}")
        left = [info for info in files.values() if info.name not in claimed]
        unused = [str(info) for info in left if info.dtype == SCALE]
        if unused:
            raise CheckpointError(f"scales that belong to no weight: {listed(unused)}")
        bare = [str(info) for info in left if info.dtype.startswith(SHORT_FLOATS)]
        if bare:
            scales = " or ".join(f"<layer>{names.scale}" for names in self.names)
            raise CheckpointError(f"no scales ({scales}) for {listed(bare)}: read without them, weights are garbage")

    def __repr__(self) -> str:
        return f"<format {self.name}>"


def as_list(config: Json, *keys: str) -> list[str]:
    """The strings under the first of ``keys`` that is there and not null; CheckpointError where it is no such list."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise CheckpointError(f"{key} must be a list of names, got {value!r:.80}")
            return value
    return []
