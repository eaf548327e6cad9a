"""``Mxfp8HfQuantizer``: what ``from_pretrained`` and ``save_pretrained`` do about MXFP8 weights."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer

from .. import settings
from ..checkpoint import CheckpointError
from ..checkpoint.formats import Format, find
from ..checkpoint.formats.plain import Unquantized
from ..convert import dequantize_at_load_
from ..format import check_compute_dtype, check_pair
from ..nn import Mxfp8Linear
from . import compat, saving
from .config import Mxfp8Config
from .description import describe
from .operations import Dequantize, Load, Quantize, is_bytes
from .plan import Plan, make_room, plain_names, plan_checkpoint, plan_quantization

_log = logging.getLogger(__name__)

Transforms = list[WeightTransform]


def attach(model: PreTrainedModel, config: Mxfp8Config | None = None) -> PreTrainedModel:
    """Lets ``save_pretrained`` of a model know its ``Mxfp8Linear`` layers, where ``from_pretrained`` did not make them:
    after ``mxfp8_ops.quantize_(model)``, for example. Without it they would be saved as if they were no MXFP8.

    Args:
        config: its ``save_format`` counts.

    Returns:
        The model itself.
    """
    quantizer = Mxfp8HfQuantizer(config or Mxfp8Config(), pre_quantized=False)
    quantizer.pre_quantized = True
    model.hf_quantizer, model.is_quantized = quantizer, True  # type: ignore[assignment]
    model.quantization_method = quantizer.quantization_config.quant_method  # type: ignore[assignment]
    quantizer.postprocess_model(model)
    return model


class Mxfp8HfQuantizer(HfQuantizer):
    """Loads MXFP8 checkpoints into ``Mxfp8Linear``, quantizes float ones while they are loaded, saves either.

    A weight that is dequantized at load, by the flag or because its module is no ``nn.Linear``, becomes dense on its
    own, as soon as its bytes have been read.
    """

    quantization_config: Mxfp8Config

    def __init__(self, quantization_config: Mxfp8Config, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # the caller's may serve other models
        if not self.pre_quantized:
            self.quantization_config.checkpoint = None
        self._files: list[str] = []
        self._plan = Plan()
        self._own: list[tuple[WeightTransform, WeightTransform | None]] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Reads the flag: ``ValueError`` where it is neither on nor off."""
        config = self.quantization_config
        config.dequantize = settings.dequant_at_load(config.dequant_at_load) is True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of all that is not quantized: float32, bfloat16 or float16, else ``TypeError``."""
        check_compute_dtype(dtype, "dtype")
        return dtype

    # --- loading -----------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [str(file) for file in checkpoint_files or []]
        if not files or not all(file.endswith(".safetensors") for file in files):
            raise ValueError(
                f"MXFP8 weights are loaded from .safetensors files, got {files or 'none'}: "
                "write them with save_pretrained, or load a float model and call mxfp8_ops.quantize_(model)"
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("MXFP8 weights cannot be sharded (distributed_config, tp_plan): use device_map")
        self._files = files

    def update_weight_conversions(self, weight_conversions: Transforms, model: PreTrainedModel) -> Transforms:
        """Plans the loading and makes room for what will come: this is the first place that knows all renamings."""
        found = describe(self._files, self.quantization_config.checkpoint)
        form = find(found)
        self.pre_quantized = not isinstance(form, Unquantized)
        if self.pre_quantized:
            conversions = self._plan_checkpoint(model, form, found.files, weight_conversions)
        else:
            self._plan_quantization(model, found.files, weight_conversions)
            conversions = weight_conversions
        _report(self._plan, self.quantization_config.dequantize)
        make_room(model, self._plan.linears())
        return conversions

    def _plan_checkpoint(self, model: PreTrainedModel, form: Format, files: Any, transforms: Transforms) -> Transforms:
        sources = form.layers(files).values()
        names = plain_names(sources)
        targets = compat.targets(names.values(), transforms, model)
        self._plan = plan_checkpoint(model, sources, targets, self.quantization_config.dequantize)
        added: Transforms = [compat.ExactRenaming(names)]
        for last in ["weight", *sorted(self._plan.fused())]:
            added.append(WeightConverter([f"{last}$", f"{last}_scale$"], last, [Load(self._plan)]))
        self._own = [(each, None) for each in added]
        changed: Transforms = []
        for original in transforms:
            first, *others = compat.with_scales(original, Dequantize(self._plan))
            changed += [first, *others]
            self._own += [(first, original), *((each, None) for each in others)]
        return [added[0], *changed, *added[1:]]

    def _plan_quantization(self, model: PreTrainedModel, files: Any, transforms: Transforms) -> None:
        config = self.quantization_config
        excluded = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, list(model._keep_in_fp32_modules or [])
        )
        targets = compat.targets(files, transforms, model)
        self._plan = plan_quantization(model, excluded, targets, config.dequantize)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Bytes stay bytes: a cast would convert them numerically."""
        return None if is_bytes(param) else dtype

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self._plan

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self._plan, self.quantization_config.rule)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _check_loaded(model, self._plan)
        compat.keep_transforms(model, self._own)
        if self.quantization_config.dequantize and not self.pre_quantized:
            self.remove_quantization_config(model)
        self._plan, self._own = Plan(), []
        return model

    # --- a loaded model ----------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes, in the format of the config, which it brings up to date."""
        config = model.config.quantization_config
        state, config.checkpoint = saving.checkpoint(model, config.save_format)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ValueError("a model on several devices cannot be dequantized: load it with dequant_at_load=True")
        dequantize_at_load_(model, True, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _check_loaded(model: PreTrainedModel, plan: Plan) -> None:
    """Raises CheckpointError where a weight has not come, or is not what it should be."""
    problems = [*plan.problems, *(f"{name} was not loaded" for name in sorted(plan.missing()))]
    for name in plan.linears():
        layer = model.get_submodule(name)
        assert isinstance(layer, Mxfp8Linear)
        if tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
            problems.append(f"{name}.weight is {list(layer.weight.shape)} in the checkpoint, but it is for {layer}")
            continue
        try:
            check_pair(layer.weight.to("meta"), layer.weight_scale.to("meta"))  # one may be offloaded
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CheckpointError(f"not loaded: {'; '.join(problems[:8])}")


def _report(plan: Plan, dequant: bool) -> None:
    for reason, count in Counter(plan.left.values()).items():
        name = next(name for name, why in plan.left.items() if why == reason)
        _log.warning("%d linears are not quantized, %s among them: %s", count, name, reason)
    if plan.dense and not dequant:
        _log.info("%d weights are dequantized, %s among them: no linears, or tied", len(plan.dense), min(plan.dense))
