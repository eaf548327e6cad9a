"""The dialects of MXFP8 on disk: which one a checkpoint is in, and what its tensors mean in it."""

from __future__ import annotations

from collections import Counter

from ..documents import MODELOPT_CONFIG, MODELSLIM_DESCRIPTION
from ..errors import CheckpointError
from .base import Description, Format
from .comfyui import ComfyUI, layer_formats
from .compressed import AutoRound, CompressedTensors
from .fp8 import Fp8Blocks, Fp8SquareBlocks, HfMxfp8
from .modelopt import ModelOpt, ModelOptMixed
from .modelslim import ModelSlim
from .plain import Unquantized
from .quark import Quark
from .torchao import TorchAO, subclasses

FORMATS: tuple[type[Format], ...] = (
    ModelOpt,
    ModelOptMixed,
    HfMxfp8,
    Fp8Blocks,
    Fp8SquareBlocks,
    CompressedTensors,
    AutoRound,
    Quark,
    ModelSlim,
    ComfyUI,
    TorchAO,
    Unquantized,
)
WRITABLE = {each.name: each for each in (ModelOpt, HfMxfp8, Fp8Blocks, CompressedTensors)}

_TELLING = (
    *("quant_method", "quant_algo", "quantization", "format", "config_groups", "weight_block_size", "scale_fmt"),
    *("bits", "group_size", "data_type", "packing_format", "global_quant_config", "quant_type"),
)


def find(found: Description) -> Format:
    """The one format that matches.

    Raises:
        CheckpointError: none does, several do, or files speak of quantization that do not belong together; lists what
        was found.
    """
    matching = [match for each in FORMATS if (match := each.match(found)) is not None]
    together = len(found.places) < 2 or (found.tensor_types is None and found.method == ModelOpt.name)
    if len(matching) == 1 and together:
        return matching[0]
    known = ", ".join(each.name for each in FORMATS)
    both = " and ".join([each.name for each in matching] if len(matching) > 1 else found.places)
    what = f"none of {known}" if not matching and together else f"contradictory, {both} do not go together"
    raise CheckpointError(f"the checkpoint's format is {what}; found: {_summary(found)}")


def _summary(found: Description) -> str:
    """What there is to tell a format by, in one line."""
    parts = []
    if found.quantization is not None:
        telling = {key: found.quantization[key] for key in _TELLING if key in found.quantization}
        parts.append("quantization_config " + _short(telling or sorted(found.quantization)))
    else:
        parts.append("no quantization_config")
    if found.modelopt is not None:
        parts.append(f"{MODELOPT_CONFIG} with quant_algo {_short(found.modelopt.get('quant_algo'))}")
    if found.tensor_types is not None:
        kinds = sorted({str(each) for each in found.tensor_types.values()})
        parts.append(f"{MODELSLIM_DESCRIPTION} with {_short(kinds)}")
    kinds = sorted({str(value["_type"]) for value in subclasses(found.files).values()})
    kinds += sorted({str(value) for value in layer_formats(found.files).values()})
    if kinds:
        parts.append(f"layers that are {_short(kinds)}")
    dtypes = Counter(info.dtype for info in found.files.values())
    parts.append("tensors of " + (", ".join(f"{dtype} ({count})" for dtype, count in dtypes.items()) or "no dtype"))
    return "; ".join(parts)


def _short(value: object) -> str:
    return f"{value!r:.500}"


__all__ = ["FORMATS", "WRITABLE", "Description", "Format", "find"]
