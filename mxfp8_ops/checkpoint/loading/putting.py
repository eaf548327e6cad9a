"""Giving a model the tensors that were loaded for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...convert import module_places, swap_module
from ...format import ELEMENT_DTYPE
from ...nn import Mxfp8Linear, PackedMxfp8Linear
from .parallel import TensorParallel
from .placing import named_tensors
from .streaming import Loaded


def put(model: nn.Module, loaded: Sequence[Loaded], parallel: TensorParallel | None = None) -> None:
    """Gives ``model`` what was loaded: tensors to the modules that it has, new modules where a linear becomes MXFP8, or
    is no longer. What shared a tensor goes on sharing it. No value is computed here that could be wrong.
    """
    kept = {each.target.name: each for each in loaded if each.scale is not None}
    values = _values(model, [each for each in loaded if each.scale is None])
    places = module_places(model)
    done = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        prefix = f"{path}." if path else ""
        weight = f"{prefix}weight"
        if module in done or not (weight in kept or any(prefix + name in values for name in _names(module))):
            continue
        done.add(module)
        own = {name: values[prefix + name] for name in _names(module) if prefix + name in values}
        if weight in kept:
            new: nn.Module = _mxfp8_linear(module, kept[weight], own.get("bias"))
        elif isinstance(module, Mxfp8Linear):
            new = _dense_linear(own)
        else:
            new = module
            _assign(module, own)
        if new is not module:
            swap_module(places, module, new.train(module.training))
        if parallel is not None:
            parallel.finish(path, new)


def _values(model: nn.Module, loaded: Sequence[Loaded]) -> dict[str, Tensor | None]:
    """The new parameter or buffer under each name in the model, also under the other names of one that is tied."""
    old = dict(named_tensors(model))
    names: dict[int, list[str]] = {}
    for name, tensor in old.items():
        names.setdefault(id(tensor), []).append(name)
    values = {each.target.name: _like(old.get(each.target.name), each.tensor) for each in loaded}
    for name, value in list(values.items()):
        for tied in names.get(id(old[name]), ()) if name in old else ():
            values.setdefault(tied, value)
    return values


def _like(old: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """``tensor`` as a Parameter where ``old`` is one, or is unknown, as the weight of a packed layer."""
    if tensor is None or not (old is None or isinstance(old, nn.Parameter)):
        return tensor
    return nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad and tensor.is_floating_point())


def _names(module: nn.Module) -> set[str]:
    """Of the tensors that checkpoints have for ``module`` itself."""
    return {"weight", "bias"} if isinstance(module, Mxfp8Linear) else {*module._parameters, *module._buffers}


def _mxfp8_linear(old: nn.Module, loaded: Loaded, bias: Tensor | None) -> Mxfp8Linear:
    assert loaded.tensor is not None
    assert loaded.scale is not None
    new = Mxfp8Linear.from_quantized(loaded.tensor.view(ELEMENT_DTYPE), loaded.scale, bias)
    return new.pack_(old._packed_for()) if isinstance(old, PackedMxfp8Linear) else new


def _dense_linear(own: Mapping[str, Tensor | None]) -> nn.Linear:
    weight = own["weight"]
    assert isinstance(weight, nn.Parameter)
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    _assign(new, own)
    return new


def _assign(module: nn.Module, own: Mapping[str, Tensor | None]) -> None:
    for name, tensor in own.items():
        if name in module._buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = tensor  # type: ignore[assignment]
    if isinstance(module, nn.Linear) and own.get("weight") is not None:
        module.out_features, module.in_features = module.weight.shape  # less than before on one of several ranks
