"""The state_dict and the ``quantization_config`` that ``save_pretrained`` writes."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn import Mxfp8Linear
from . import compat
from .description import writable


def checkpoint(model: PreTrainedModel, save_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``model`` under the names of a format, and the config that says so.

    Packed layers give canonical weights, copies of theirs. Nothing else is copied.

    Raises:
        ValueError: no such format; or the renamings of the model would part weights from their scales.
    """
    form = writable(save_format)
    ending: str = form.names[0].scale
    quantized = [name for name, module in model.named_modules(remove_duplicate=False) if _is_quantized(module)]
    renamed = {f"{name}.weight_scale": name + ending for name in quantized}
    state = {renamed.get(name, name): tensor for name, tensor in model.state_dict().items()}
    _check_together(compat.saved_names(model, state), ending, len(quantized))
    return state, form.config(_unquantized(model))


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, Mxfp8Linear)


def _check_together(names: dict[str, Tensor], ending: str, count: int) -> None:
    scales = [name for name in names if name.endswith(ending)]
    alone = [name for name in scales if f"{name.removesuffix(ending)}.weight" not in names]
    if alone or len(scales) != count:
        raise ValueError(
            f"the original names of this model part weights from their scales ({alone[:4]}): "
            "call save_pretrained(..., save_original_format=False)"
        )


def _unquantized(model: PreTrainedModel) -> list[str]:
    """Modules with a float matrix, embeddings aside, by the model's names and by those of the file."""
    names = set()
    for name, module in model.named_modules():
        if _is_quantized(module) or isinstance(module, nn.Embedding):
            continue
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                names |= {name, *_modules(list(compat.saved_names(model, {f"{name}.{part}": parameter})))}
    return sorted(names - {""})


def _modules(parameters: list[str]) -> set[str]:
    """The modules of ``parameters``; of experts, numbered from 0, the module that holds them all."""
    paths = [name.split(".")[:-1] for name in parameters]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    if any(path[len(shared) :][:1] == ["0"] for path in paths):
        return {".".join(shared)}
    return {".".join(path) for path in paths}
