"""state_dict, conversions, copies and pickles of packed layers: canonical, and every byte of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs
from test_nn import CONVERSIONS, every_code, saved_and_loaded, small
from test_nn_packed import DTYPES, assert_every_code_packed, assert_state, is_packed, other_codes
from torch import Tensor, nn

import mxfp8_ops
from mxfp8_ops import Mxfp8Linear, functional, pack_

# --- state_dict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_of_a_packed_layer_is_that_of_the_canonical_one(bias: bool) -> None:
    expected = every_code(bias).state_dict()
    assert_state(every_code(bias).pack_(), expected)
    model = nn.Sequential(every_code(bias))
    names = list(model.state_dict(prefix="model."))
    pack_(model)
    assert list(model.state_dict(prefix="model.")) == names
    assert model.state_dict()._metadata == nn.Sequential(every_code(bias)).state_dict()._metadata


def test_keep_vars_gives_parameters_and_the_bias_itself() -> None:
    module = small().pack_()
    state = module.state_dict(keep_vars=True)
    assert type(state["weight"]) is nn.Parameter
    assert not state["weight"].requires_grad
    assert state["bias"] is module.bias
    assert type(state["weight_scale"]) is Tensor
    assert not module.state_dict()["bias"].requires_grad


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("packed", [(True, False), (False, True), (True, True)])
def test_checkpoints_go_between_packed_and_canonical_layers(packed: tuple[bool, bool], assign: bool) -> None:
    source, target = nn.Sequential(every_code()), nn.Sequential(Mxfp8Linear(256, 256))
    for model, pack in zip((source, target), packed, strict=True):
        if pack:
            pack_(model)
    checkpoint = saved_and_loaded(source.state_dict(), weights_only=True)
    assert target.load_state_dict(checkpoint, strict=True, assign=assign) == ([], [])
    assert is_packed(target[0]) is packed[1]
    assert_state(target[0], every_code().state_dict())
    assert_same(target(torch.ones(1, 256)), every_code()(torch.ones(1, 256)))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("weight_dtype", [torch.uint8, torch.float8_e4m3fn])
def test_a_packed_layer_loads_every_byte_from_any_form(
    weight_dtype: torch.dtype, scale_dtype: torch.dtype, assign: bool
) -> None:
    module = every_code().pack_()
    new = other_codes()
    forms = {"weight": new["weight"].view(weight_dtype), "weight_scale": new["weight_scale"].view(scale_dtype)}
    module.load_state_dict(new | forms, assign=assign)
    assert is_packed(module)
    assert_same(module.weight_packed, mxfp8_ops.pack(new["weight"], new["weight_scale"]))
    assert_state(module, new)


def test_loading_writes_into_the_packed_weight_and_assigning_replaces_it() -> None:
    module = every_code().pack_()
    packed, version = module.weight_packed, module.weight_packed._version
    module.load_state_dict(other_codes())
    assert module.weight_packed is packed
    assert packed._version > version
    module.load_state_dict(every_code().state_dict(), assign=True)
    assert module.weight_packed is not packed
    assert_every_code_packed(module)


def test_a_packed_meta_model_is_loaded_by_assignment() -> None:
    model = nn.Sequential(Mxfp8Linear(256, 256, device="meta"))
    assert pack_(model) == 1
    assert model[0].weight_packed.is_meta
    model.load_state_dict({f"0.{name}": tensor for name, tensor in every_code().state_dict().items()}, assign=True)
    assert_every_code_packed(model[0])


BAD_CHECKPOINTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "missing weight": lambda state: {k: v for k, v in state.items() if k != "weight"},
    "missing scale": lambda state: {k: v for k, v in state.items() if k != "weight_scale"},
    "unexpected": lambda state: {**state, "extra": torch.ones(1)},
    "packed by hand": lambda state: {**state, "weight_packed": torch.ones(265, 32, dtype=torch.int32)},
    "misshapen scale": lambda state: {**state, "weight_scale": torch.ones(256, 7, dtype=torch.uint8)},
    "misshapen weight": lambda state: {**state, "weight": state["weight"][:255]},
    "dense": lambda state: {**state, "weight": torch.ones(256, 256)},
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("change", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_reported_and_loaded_as_by_the_canonical_layer(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], assign: bool
) -> None:
    canonical, packed = nn.Sequential(every_code()), nn.Sequential(every_code().pack_())
    checkpoint = {f"0.{name}": tensor for name, tensor in change(other_codes()).items()}
    errors = []
    for model in (canonical, packed):
        with pytest.raises(RuntimeError, match="Error") as caught:
            model.load_state_dict(checkpoint, assign=assign)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert is_packed(packed[0])
    assert_state(packed, canonical.state_dict())


def test_a_checkpoint_without_the_layer_leaves_it_when_that_is_allowed() -> None:
    module = every_code().pack_()
    assert module.load_state_dict({}, strict=False).missing_keys == ["weight", "bias", "weight_scale"]
    assert_every_code_packed(module)


# --- what happens to a module --------------------------------------------------------------------------


@pytest.mark.parametrize(("convert", "bias_dtype"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_no_conversion_changes_a_byte(convert: Callable[[nn.Module], nn.Module], bias_dtype: torch.dtype) -> None:
    module = convert(every_code().pack_())
    assert isinstance(module, Mxfp8Linear)
    assert_every_code_packed(module)
    assert module.bias is not None
    assert_same(module.bias, torch.arange(256.0).to(bias_dtype))
    inner = convert(nn.Sequential(every_code(bias=False).pack_()))
    assert_every_code_packed(inner[0])  # type: ignore[index]
    assert_state(module.unpack_(), every_code().state_dict() | {"bias": module.bias.detach()})


def test_moving_to_another_device_keeps_the_packed_form() -> None:
    for module in (every_code().pack_().to("meta"), every_code().pack_().half().to_empty(device="meta")):
        assert module.weight_packed.dtype == torch.int32
        assert {(t.device.type, t.dtype) for n, t in module.state_dict().items() if n != "bias"} == {
            ("meta", torch.float8_e4m3fn),
            ("meta", torch.uint8),
        }
        empty = module.to_empty(device="cpu")
        empty.load_state_dict(every_code().state_dict())
        assert_every_code_packed(empty)


def test_shared_memory_is_shared() -> None:
    assert every_code().pack_().share_memory().weight_packed.is_shared()


def test_copies_are_independent_where_copies_should_be() -> None:
    module = every_code().pack_()
    deep, shallow = copy.deepcopy(module), copy.copy(module)
    assert shallow.weight_packed is module.weight_packed
    deep.load_state_dict(other_codes())
    assert_every_code_packed(module)
    assert_state(deep, other_codes())


@pytest.mark.parametrize("dump", [pickle.dumps, lambda model: saved(model)])
def test_pickles_hold_the_canonical_weight_whatever_the_layout(
    dump: Callable[[Any], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dump(every_code().pack_())
    pack, packed = functional.pack, []
    monkeypatch.setattr(functional, "pack", lambda w, s, dtype: packed.append((w, s)) or pack(w, s, dtype))
    module = pickle.loads(data) if dump is pickle.dumps else torch.load(io.BytesIO(data), weights_only=False)
    assert_every_code_packed(module)
    ((weight, scale),) = packed
    assert_same(weight, all_codes()[0])
    assert_same(scale, all_codes()[1])


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_a_pickle_is_loaded_onto_another_device() -> None:
    module = torch.load(io.BytesIO(saved(every_code().pack_())), weights_only=False, map_location="meta")
    assert (module.weight_packed.device.type, tuple(module.weight_packed.shape)) == ("meta", (4 * 132 + 1, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_x_and_bias_are_those_of_the_canonical_layer(dtype: torch.dtype) -> None:
    x = exact_linear_inputs(3, 7, 96, dtype)[0].requires_grad_()
    results = []
    for module in (small(dtype=dtype), small(dtype=dtype).pack_()):
        module.train()
        results.append(torch.autograd.grad(module(x).sum(), (x, module.bias)))
    for packed, canonical in zip(*results, strict=True):
        assert_same(packed, canonical)


def test_the_bias_trains_and_the_weight_stays() -> None:
    x = exact_linear_inputs(3, 7, 96, torch.float32)[0]
    modules = small(), small().pack_()
    before = modules[1].weight_packed.clone()
    for module in modules:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.25)
        module(x).square().sum().backward()
        optimizer.step()
    assert (modules[0].bias != small().bias).any()
    assert_same(modules[1].bias, modules[0].bias)
    assert_same(modules[1].weight_packed, before)
