"""No format of MXFP8 at all: a checkpoint in bfloat16, float16 or float32, to be quantized or loaded as it is."""

from __future__ import annotations

from typing import ClassVar

from ..files import TensorFiles
from ..layer import SHORT_FLOATS, LayerSource
from .base import Description, Format, Names
from .comfyui import layer_formats


class Unquantized(Format):
    """Nothing is said about quantization, and no tensor looks like it."""

    name: ClassVar[str] = "unquantized"
    names: ClassVar[tuple[Names, ...]] = ()

    @classmethod
    def match(cls, found: Description) -> Unquantized | None:
        if found.places or layer_formats(found.files):
            return None
        return None if any(info.dtype.startswith(SHORT_FLOATS) for info in found.files.values()) else cls()

    def layers(self, files: TensorFiles) -> dict[str, LayerSource]:
        return {}
