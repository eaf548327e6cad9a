"""A packed Mxfp8Linear: it answers as before, and its checkpoints stay canonical."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs
from models import folding, layer, rows
from test_nn import CONVERSIONS, every_code, saved_and_loaded, small
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import mxfp8_ops
from mxfp8_ops import Mxfp8Linear, functional, pack_
from mxfp8_ops.packing import packed_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_packed(module: nn.Module) -> bool:
    return "weight_packed" in module._parameters


def assert_every_code_packed(module: Mxfp8Linear) -> None:
    weight, scale = all_codes()
    assert is_packed(module)
    assert isinstance(module, Mxfp8Linear)
    packed = dict(module.named_parameters())["weight_packed"]
    assert type(packed) is nn.Parameter
    assert not packed.requires_grad
    assert_same(packed, mxfp8_ops.pack(weight, scale))
    state = module.state_dict()
    assert_same(state["weight"], weight)
    assert_same(state["weight_scale"], scale)


def other_codes() -> dict[str, Tensor]:
    """A checkpoint that differs from that of ``every_code`` in every byte."""
    weight, scale = all_codes()
    return {
        "weight": weight.view(torch.uint8).bitwise_not().view(weight.dtype),
        "bias": -1 - torch.arange(256.0),
        "weight_scale": scale.bitwise_not(),
    }


def assert_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    state = module.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert_same(tensor, expected[name])


def storages(module: Mxfp8Linear) -> list[StorageWeakRef]:
    return [StorageWeakRef(t.untyped_storage()) for t in (module.weight, module.weight_scale)]


# --- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_answers_as_before_and_calls_linear_packed(
    bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small(bias, dtype)
    x = exact_linear_inputs(3, 7, 96, dtype)[0]
    expected = module(x)
    module.pack_()
    calls = []
    monkeypatch.setattr(functional, "linear", None)
    linear_packed = functional.linear_packed
    monkeypatch.setattr(functional, "linear_packed", lambda *args: calls.append(args) or linear_packed(*args))
    assert_same(module(x), expected)
    assert len(calls) == 1
    assert calls[0][1] is module.weight_packed


def test_packing_and_unpacking_return_the_layer_and_keep_every_byte() -> None:
    module = every_code()
    names = [[name for name, _ in f()] for f in (module.named_parameters, module.named_buffers)]
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert module.pack_() is module
    assert_every_code_packed(module)
    assert [name for name, _ in module.named_parameters()] == ["weight_packed", "bias"]
    assert not list(module.named_buffers())
    assert module.unpack_() is module
    assert type(module) is Mxfp8Linear
    assert not is_packed(module)
    assert [[name for name, _ in f()] for f in (module.named_parameters, module.named_buffers)] == names
    assert_state(module, expected)
    assert not module.weight.requires_grad


def test_packing_twice_and_unpacking_twice_change_nothing_more() -> None:
    module = small().pack_()
    packed = module.weight_packed
    assert module.pack_() is module
    assert module.weight_packed is packed
    weight = module.unpack_().weight
    assert module.unpack_() is module
    assert module.weight is weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_packed_for_x_of_its_bias_s_dtype_unless_told(dtype: torch.dtype) -> None:
    for module in (small(True, dtype), nn.Sequential(small(True, dtype))):
        (layer,) = (each for each in module.modules() if isinstance(each, Mxfp8Linear))
        own = torch.float16 if dtype == torch.float16 else torch.bfloat16
        for asked, expected in ((None, own), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)):
            layer.unpack_()
            layer.pack_(asked) if module is layer else pack_(module, asked)
            assert packed_for(layer.weight_packed) == expected
    assert packed_for(small(False, dtype).pack_().weight_packed) == torch.bfloat16


def test_what_a_layer_is_packed_for_stays_until_it_is_packed_for_another_dtype() -> None:
    module = every_code().pack_(torch.float16)
    expected = module.weight_packed.clone()
    module.load_state_dict(every_code().state_dict())
    module.half().bfloat16()
    loaded = pickle.loads(pickle.dumps(module)), saved_and_loaded(module, False)
    for each in (module.pack_(), copy.deepcopy(module), *loaded):
        assert packed_for(each.weight_packed) == torch.float16
        assert_same(each.weight_packed, expected)
    assert module.pack_(torch.bfloat16) is module
    assert packed_for(module.weight_packed) == torch.bfloat16
    assert_every_code_packed(module)


def test_a_dtype_that_no_weight_is_packed_for_is_refused_and_the_layer_left() -> None:
    for module in (small(), small().pack_(torch.float16)):
        before = dict(module.named_parameters())
        for wrong, error in ((torch.float32, ValueError), ("float16", TypeError)):
            with pytest.raises(error, match="dtype"):
                module.pack_(wrong)
            assert all(module.get_parameter(name) is each for name, each in before.items())


def test_the_text_tells_that_a_layer_is_packed() -> None:
    module = small().pack_()
    assert repr(module) == "Mxfp8Linear(in_features=96, out_features=7, bias=True, packed=bfloat16)"
    assert repr(module.unpack_()) == "Mxfp8Linear(in_features=96, out_features=7, bias=True)"


def test_mode_bias_hooks_and_tensors_of_the_user_stay() -> None:
    module = small().eval()
    bias, seen = module.bias, []
    module.register_forward_hook(lambda *_: seen.append(1))
    module.register_buffer("counter", torch.tensor([3], dtype=torch.int32))
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    keys = list(module.state_dict())
    for step in (module.pack_, module.unpack_):
        step()
        assert not module.training
        assert module.bias is bias
        module(torch.ones(1, 96))
        assert sorted(module.state_dict()) == sorted(keys)
        assert_same(module.counter, torch.tensor([3], dtype=torch.int32))
        assert_same(module.scratch, torch.ones(2))
    assert seen == [1, 1]


def test_a_shallow_copy_is_packed_alone() -> None:
    module = every_code()
    twin = copy.copy(module).pack_()
    assert not is_packed(module)
    assert_state(module, every_code().state_dict())
    assert_every_code_packed(twin)
    third = copy.copy(twin).unpack_()
    assert_every_code_packed(twin)
    assert_state(third, every_code().state_dict())


def test_a_subclass_is_not_packed_in_place() -> None:
    class Subclass(Mxfp8Linear):
        pass

    module = Subclass(64, 5)
    with pytest.raises(TypeError, match="Subclass is a subclass of Mxfp8Linear and cannot be packed in place"):
        module.pack_()
    assert not is_packed(module)
    assert pack_(nn.Sequential(module)) == 0
    assert type(module) is Subclass


@pytest.mark.parametrize("pack", [Mxfp8Linear.pack_, pack_])
def test_a_weight_that_wants_a_gradient_is_refused_and_left(pack: Callable[[Mxfp8Linear], Any]) -> None:
    module = small()
    module.weight.requires_grad_()
    with pytest.raises(ValueError, match="MXFP8 weight is frozen"):
        pack(module)
    assert type(module) is Mxfp8Linear
    assert_state(module, small().state_dict())


@pytest.mark.parametrize("pack", [Mxfp8Linear.pack_, pack_])
def test_a_released_weight_is_refused_and_left(pack: Callable[[Mxfp8Linear], Any]) -> None:
    module = layer()
    compiled = torch.compile(module, backend=folding(dequant_at_load=True, release_quantized=True), fullgraph=True)
    expected = compiled(rows())
    with pytest.raises(ValueError, match="this MXFP8 weight was released"):
        pack(module)
    assert type(module) is Mxfp8Linear
    assert_same(compiled(rows()), expected)
    with pytest.raises(ValueError, match="this MXFP8 weight was released"):
        module.state_dict()


# --- reading and replacing the weight ------------------------------------------------------------------


def test_weight_and_scale_are_read_as_copies_that_do_not_reach_the_layer() -> None:
    module = every_code().pack_()
    weight, scale = all_codes()
    assert_same(module.weight, weight)
    assert_same(module.weight_scale, scale)
    assert (module.weight.dtype, module.weight.device.type, module.weight.requires_grad) == (weight.dtype, "cpu", False)
    module.weight.view(torch.uint8).zero_()
    module.weight_scale.zero_()
    assert_every_code_packed(module)
    for actual, expected in zip(module.quantized(), (weight, scale), strict=True):
        assert_same(actual, expected)


def test_quantized_gives_the_tensors_of_a_layer_that_is_not_packed() -> None:
    module = small()
    assert module.quantized() == (module.weight, module.weight_scale)
    twin = Mxfp8Linear.from_quantized(*small().pack_().quantized(), module.bias)
    assert_state(twin, module.state_dict())


@pytest.mark.parametrize("name", ["weight", "weight_scale"])
@pytest.mark.parametrize("make", [lambda t: t, lambda t: nn.Parameter(t, requires_grad=False), lambda t: None])
def test_replacing_the_weight_of_a_packed_layer_is_a_clear_error(make: Callable[[Tensor], Any], name: str) -> None:
    module = every_code().pack_()
    with pytest.raises(AttributeError, match=rf"^{name} of a packed Mxfp8Linear cannot be replaced: call unpack_\(\)"):
        setattr(module, name, make(other_codes()[name]))
    assert_every_code_packed(module)


def test_the_bias_of_a_packed_layer_can_be_replaced() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.float32)
    module = small().pack_()
    module.bias = nn.Parameter(-bias)
    assert_same(module(x), mxfp8_ops.linear(x, weight, scale, -bias))
    module.bias = None
    assert_same(module(x), mxfp8_ops.linear(x, weight, scale))


def test_functional_call_swaps_the_packed_weight_and_the_bias() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.float32)
    packed = mxfp8_ops.pack(weight.view(torch.uint8).flip(0).view(weight.dtype), scale)
    y = torch.func.functional_call(small().pack_(), {"weight_packed": packed, "bias": -bias}, (x,))
    assert_same(y, mxfp8_ops.linear_packed(x, packed, 7, -bias))


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
