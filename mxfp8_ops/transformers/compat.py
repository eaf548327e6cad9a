"""What the plug-in uses of transformers beyond its documented API, each thing behind one function.

Read in 5.23 and 5.24, where all of it has the same form. Before, the loader cast float weights to the dtype of the
bytes that they were to be quantized to; before 5.21 a quantizer had no say in that, and was not given the renamings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)


def targets(
    names: Iterable[str], transforms: Sequence[WeightTransform], model: PreTrainedModel
) -> dict[str, tuple[str, bool]]:
    """Where ``from_pretrained`` puts the tensors of a checkpoint.

    Args:
        names: of the checkpoint.
        transforms: those of the model and of the caller's ``key_mapping``; they are left untouched.
        model: a PreTrainedModel.

    Returns:
        For each name that of the model's parameter or buffer, and whether it arrives as it is: not where a converter
        merges, splits or transposes it. Names that the model does not have are left out.
    """
    transforms = copy.deepcopy(list(transforms))  # they note which of them were used
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state = model.state_dict()
    prefix: Any = model.base_model_prefix
    found = {}
    for name in sorted(names):
        target, converter = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converter = name, None
        if target in state:
            found[name] = target, converter is None
    return found


class ExactRenaming(WeightRenaming):
    """Renames whole names, looked up in a dict, where others search for patterns."""

    __slots__ = ("names",)

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__("^$", "")
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return self.names[source_key], source_key


def with_scales(transform: WeightTransform, first: ConversionOps) -> list[WeightTransform]:
    """``transform``, and what it must be for scales, "<weight>_scale", to go where their weights go.

    Args:
        transform: of a model, such as "experts.*.w1.weight" and "experts.*.w3.weight" to "experts.gate_up_proj".
        first: the operation that takes weights and scales and hands on weights.
    """
    sources, into = transform._original_source_patterns, transform._original_target_patterns
    if not all(source.endswith(".weight") for source in sources):
        return [transform]
    scales = [f"{source}_scale" for source in sources]
    if isinstance(transform, WeightConverter):
        return [transform.copy([*sources, *scales], list(into), operations=[first, *transform.operations])]
    if type(transform) is WeightRenaming and all(name.endswith(".weight") for name in into):
        return [transform, transform.copy(scales, [f"{name}_scale" for name in into])]
    return [transform]


def keep_transforms(model: PreTrainedModel, own: Sequence[tuple[WeightTransform, WeightTransform | None]]) -> None:
    """Brings the transforms that ``save_pretrained`` will revert to those of the model: what the quantizer added is
    dropped, what it changed is put back.

    Args:
        own: pairs of a transform that was used in loading and what it stands for, None where that is nothing.
    """
    before = {id(used): original for used, original in own}
    used: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if used is None:
        return  # 5.24 forgets them where the quantization_config goes
    originals = [before.get(id(each), each) for each in used]
    model._weight_conversions = [each for each in originals if each is not None]  # type: ignore[assignment]


def saved_names(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the names that ``save_pretrained`` gives it, as tensors without values."""
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return revert_weight_conversion(model, empty)
