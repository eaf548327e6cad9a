"""A packed Mxfp8Linear: it answers as before, and its weight is read as if it were not packed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same, exact_linear_inputs
from models import folding, layer, rows
from test_nn import every_code, saved_and_loaded, small
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
