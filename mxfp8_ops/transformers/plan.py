"""What becomes of the weights of a model, known from names, dtypes and shapes before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.errors import CheckpointError, listed
from ..checkpoint.layer import LayerSource
from ..checkpoint.layouts import Layout, RowMajor
from ..checkpoint.names import modules, wildcards
from ..convert import linears_to_leave, module_places, swap_module
from ..format import BLOCK_SIZE
from ..nn import Mxfp8Linear

Targets = Mapping[str, tuple[str, bool]]


@dataclass
class Plan:
    """What to make of the weights of a model, by the model's names, and what has come of it.

    Attributes:
        kept: weights of linears that become ``Mxfp8Linear``, and how the checkpoint stores their scales.
        dense: weights that are dequantized while they are loaded, likewise.
        left: linears that are not quantized although the config does not exclude them, and why.
        loaded: weights that were delivered.
        problems: what is wrong with the values of some.
    """

    kept: dict[str, Layout] = field(default_factory=dict)
    dense: dict[str, Layout] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def __contains__(self, weight: str) -> bool:
        return weight in self.kept or weight in self.dense

    def missing(self) -> set[str]:
        """Weights that have not been delivered."""
        return (self.kept.keys() | self.dense.keys()) - self.loaded

    def fused(self) -> set[str]:
        """How dense parameters are called that are not called "weight", such as those of fused experts."""
        return {name.rpartition(".")[2] for name in self.dense} - {"weight"}

    def linears(self) -> list[str]:
        """The modules that ``kept`` names."""
        return sorted(weight.removesuffix(".weight") for weight in self.kept)


def plain_names(sources: Iterable[LayerSource]) -> dict[str, str]:
    """Names for the tensors of MXFP8 layers: of weights those that a model has, of scales "<weight>_scale"."""
    names: dict[str, str] = {}
    for source in sources:
        names |= {source.weight.name: source.parameter, source.scale.name: f"{source.parameter}_scale"}
    return names


def plan_checkpoint(model: PreTrainedModel, sources: Iterable[LayerSource], targets: Targets, dequant: bool) -> Plan:
    """Which linears of ``model`` become ``Mxfp8Linear`` for the layers of an MXFP8 checkpoint.

    Dense are: all with ``dequant``, and otherwise the parameters of modules that are no ``nn.Linear`` (experts and
    embeddings, for example), weights that are tied to others, those that several tensors make up, and those whose rows
    are no whole blocks.

    Args:
        targets: the model's name of a weight, and whether it arrives as it is.

    Raises:
        CheckpointError: a weight has another shape than in the model, the bias of a linear is missing, scales of one
        parameter are stored in different ways, or the model has none of the layers.
    """
    plan, names = Plan(), []
    for source in sources:
        names.append(source.name)
        if source.parameter not in targets:
            continue  # of a part that this model does not have
        target, whole = targets[source.parameter]
        if whole:
            _check_fits(model, target, source)
        if dequant or not whole or source.shape[-1] % BLOCK_SIZE or not _replaceable(model, target):
            if plan.dense.setdefault(target, source.layout) != source.layout:
                raise CheckpointError(f"{target} comes from tensors whose scales are stored in different ways")
        else:
            plan.kept[target] = source.layout
    if names and not plan.missing():
        raise CheckpointError(f"{type(model).__name__} has none of the checkpoint's MXFP8 layers: {listed(names)}")
    return plan


def plan_quantization(model: PreTrainedModel, excluded: list[str], targets: Targets, dequant: bool) -> Plan:
    """Which linears of ``model`` to quantize while the weights of a float checkpoint are loaded.

    Args:
        excluded: linears to leave: names, beginnings and ends of names up to a dot, wildcards.
        targets: the model's name of each tensor of the checkpoint.
        dequant: the weights become dense again at once.
    """
    loaded = {target for target, _ in targets.values()}
    selected = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_listed(name, excluded)
    }
    left = {selected[linear]: why for linear, why in linears_to_leave(model, selected).items()}
    for module, name in selected.items():
        if any(f"{name}.{part}" not in loaded for part, _ in module.named_parameters(recurse=False)):
            left.setdefault(name, "it is not in the checkpoint, and starts anew")
    chosen: dict[str, Layout] = {f"{name}.weight": RowMajor() for name in selected.values() if name not in left}
    return Plan(dense=chosen, left=left) if dequant else Plan(kept=chosen, left=left)


def is_listed(name: str, patterns: list[str]) -> bool:
    """Whether a pattern is ``name``, its beginning or end up to a dot, or matches it with wildcards."""
    return modules(name, patterns) or wildcards(name, patterns)


def make_room(model: nn.Module, names: Iterable[str]) -> None:
    """Puts empty ``Mxfp8Linear`` layers on the meta device in the place of linears, wherever these are used."""
    places = module_places(model)
    for linear in {model.get_submodule(name) for name in names}:
        assert isinstance(linear, nn.Linear)
        swap_module(places, linear, _empty(linear))


def _empty(linear: nn.Linear) -> Mxfp8Linear:
    has_bias = linear.bias is not None
    dtype = linear.bias.dtype if has_bias else None
    return Mxfp8Linear(linear.in_features, linear.out_features, has_bias, "meta", dtype).train(linear.training)


def _replaceable(model: PreTrainedModel, weight: str) -> bool:
    tied: dict[str, str] = model.all_tied_weights_keys
    name = weight.removesuffix(".weight")
    is_tied = weight in tied or weight in tied.values()
    return name != weight and type(model.get_submodule(name)) is nn.Linear and not is_tied


def _check_fits(model: PreTrainedModel, target: str, source: LayerSource) -> None:
    shape = tuple(model.get_parameter_or_buffer(target).shape)
    if shape != source.shape:
        raise CheckpointError(f"{source.weight} must be {list(shape)}, as {target} is in {type(model).__name__}")
    module = model.get_submodule(target.rpartition(".")[0])
    if isinstance(module, nn.Linear) and module.bias is not None and source.bias is None:
        raise CheckpointError(f"{source.name}.bias is not in the checkpoint, but {type(model).__name__} has it")
