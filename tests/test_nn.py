"""Mxfp8Linear: packed bytes never change, whatever happens to the module around them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same, bits, exact_linear_inputs
from torch import Tensor, nn

import mxfp8_ops
from mxfp8_ops import Mxfp8Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def every_code(bias: bool = True) -> Mxfp8Linear:
    """``[256, 256]``: all elements under all scales, so that no change of any byte goes unnoticed."""
    weight, scale = all_codes()
    return Mxfp8Linear.from_quantized(weight.clone(), scale.clone(), torch.arange(256.0) if bias else None)


def small(bias: bool = True, dtype: torch.dtype = torch.float32) -> Mxfp8Linear:
    _, weight, scale, offset = exact_linear_inputs(3, 7, 96, dtype)
    return Mxfp8Linear.from_quantized(weight, scale, offset if bias else None)


def assert_every_code(module: Mxfp8Linear) -> None:
    weight, scale = all_codes()
    assert type(module.weight) is nn.Parameter
    assert not module.weight.requires_grad
    assert_same(module.weight, weight)
    assert_same(module.weight_scale, scale)


def saved_and_loaded(thing: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# --- making one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_operator(dtype: torch.dtype, bias: bool) -> None:
    x, weight, scale, offset = exact_linear_inputs(3, 7, 96, dtype)
    module = Mxfp8Linear.from_quantized(weight, scale, offset if bias else None)
    assert_same(module(x), mxfp8_ops.linear(x, weight, scale, offset if bias else None))
    assert (module.in_features, module.out_features) == (96, 7)


def test_from_quantized_wraps_without_a_copy() -> None:
    _, weight, scale, offset = exact_linear_inputs(1, 7, 96, torch.float32)
    bias = nn.Parameter(offset)
    module = Mxfp8Linear.from_quantized(weight, scale.view(torch.float8_e8m0fnu), bias)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert module.weight_scale.data_ptr() == scale.data_ptr()
    assert module.weight_scale.dtype == torch.uint8
    assert module.bias is bias


def test_from_quantized_freezes_a_parameter_that_wants_a_gradient() -> None:
    x, weight, scale, _ = exact_linear_inputs(3, 7, 96, torch.float32)
    parameter = nn.Parameter(weight)
    module = Mxfp8Linear.from_quantized(parameter, scale)
    assert parameter.requires_grad
    assert not module.weight.requires_grad
    assert_same(module(x), mxfp8_ops.linear(x, weight, scale))


def test_from_quantized_keeps_a_frozen_parameter_so_that_layers_can_share_it() -> None:
    one = small()
    other = Mxfp8Linear.from_quantized(one.weight, one.weight_scale)
    assert other.weight is one.weight


@pytest.mark.parametrize("rule", ["rceil", "floor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_float_is_quantize(dtype: torch.dtype, rule: str) -> None:
    weight = (500 * torch.rand(7, 96, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    module = Mxfp8Linear.from_float(weight, rule=rule)
    expected_weight, expected_scale = mxfp8_ops.quantize(weight, rule)
    assert_same(module.weight, expected_weight)
    assert_same(module.weight_scale, expected_scale)
    assert module.bias is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_takes_over_bias_and_mode(bias: bool, training: bool) -> None:
    linear = nn.Linear(96, 7, bias=bias).train(training)
    module = Mxfp8Linear.from_linear(linear)
    assert module.bias is linear.bias
    assert module.training is training
    assert_same(module.weight, mxfp8_ops.quantize(linear.weight)[0])


def test_a_fresh_module_is_zero_until_it_is_loaded() -> None:
    module = Mxfp8Linear(64, 5, dtype=torch.bfloat16)
    assert_same(module(torch.ones(2, 64, dtype=torch.bfloat16)), torch.zeros(2, 5, dtype=torch.bfloat16))
    assert module.bias is not None
    assert module.bias.requires_grad
    assert Mxfp8Linear(64, 5, bias=False).bias is None
    assert {t.device.type for t in Mxfp8Linear(64, 5, device="meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mxfp8Linear(33, 5), "multiple of 32 and out_features positive, got 33 and 5"),
        (lambda: Mxfp8Linear(0, 5), "got 0 and 5"),
        (lambda: Mxfp8Linear(-32, 5), "got -32 and 5"),
        (lambda: Mxfp8Linear(64, 0), "got 64 and 0"),
        (lambda: Mxfp8Linear.from_quantized(torch.zeros(96).to(torch.float8_e4m3fn), torch.zeros(3)), r"\[N, K\]"),
        (lambda: Mxfp8Linear.from_float(torch.zeros(2, 7, 96)), r"\[N, K\], got \[2, 7, 96\]"),
        (lambda: Mxfp8Linear.from_linear(nn.Linear(33, 5)), "K=33"),
    ],
)
def test_a_shape_that_cannot_be_packed_is_a_value_error(make: Callable[[], Mxfp8Linear], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_its_text_tells_shape_and_bias() -> None:
    assert repr(small()) == "Mxfp8Linear(in_features=96, out_features=7, bias=True)"
    assert repr(small(bias=False)) == "Mxfp8Linear(in_features=96, out_features=7, bias=False)"


# --- state_dict ----------------------------------------------------------------------------------------


def test_state_dict_uses_the_names_of_checkpoints() -> None:
    assert list(small().state_dict()) == ["weight", "bias", "weight_scale"]
    assert list(small(bias=False).state_dict(prefix="layer.")) == ["layer.weight", "layer.weight_scale"]
    assert [name for name, _ in small().named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("weight_dtype", [torch.uint8, torch.float8_e4m3fn])
def test_every_byte_is_loaded_from_any_form(weight_dtype: torch.dtype, scale_dtype: torch.dtype, assign: bool) -> None:
    weight, scale = all_codes()
    checkpoint = {"0.weight": weight.view(weight_dtype), "0.weight_scale": scale.view(scale_dtype)}
    model = nn.Sequential(Mxfp8Linear(256, 256, bias=False))
    model.load_state_dict(checkpoint, assign=assign)
    assert_every_code(model[0])
    assert (model[0].weight.data_ptr() == weight.data_ptr()) is assign
    assert checkpoint["0.weight"].dtype == weight_dtype
    assert checkpoint["0.weight_scale"].dtype == scale_dtype


def test_a_meta_model_is_loaded_by_assignment() -> None:
    weight, scale = all_codes()
    module = Mxfp8Linear(256, 256, bias=False, device="meta")
    module.load_state_dict({"weight": weight, "weight_scale": scale.view(torch.float8_e8m0fnu)}, assign=True)
    assert_every_code(module)


@pytest.mark.parametrize("weights_only", [True, False])
def test_save_and_load_of_a_state_dict_keep_every_byte(weights_only: bool) -> None:
    module = Mxfp8Linear(256, 256)
    module.load_state_dict(saved_and_loaded(every_code().state_dict(), weights_only))
    assert_every_code(module)
    assert_same(module.bias, torch.arange(256.0))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("name", "tensor", "got"),
    [
        ("weight", torch.ones(7, 96), "float32"),
        ("weight", torch.ones(7, 96, dtype=torch.bfloat16), "bfloat16"),
        ("weight", torch.ones(7, 96, dtype=torch.int8), "int8"),
        ("weight", torch.ones(7, 96).to(torch.float8_e5m2), "float8_e5m2"),
        ("weight", torch.ones(7, 96, dtype=torch.uint8).view(torch.float8_e8m0fnu), "float8_e8m0fnu"),
        ("weight_scale", torch.ones(7, 3), "float32"),
        ("weight_scale", torch.ones(7, 3, dtype=torch.uint8).view(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_a_checkpoint_that_is_not_packed_is_refused_and_nothing_is_loaded(
    name: str, tensor: Tensor, got: str, assign: bool
) -> None:
    model = nn.Sequential(small())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checkpoint = {key: torch.full_like(value.view(torch.uint8), 1).view(value.dtype) for key, value in before.items()}
    with pytest.raises(RuntimeError, match=rf"0\.{name} must hold packed .* got torch\.{got}: quantize the checkpoint"):
        model.load_state_dict(checkpoint | {f"0.{name}": tensor}, assign=assign)
    for key, value in model.state_dict().items():
        assert_same(value, before[key])


def test_a_checkpoint_of_a_plain_linear_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"weight must hold packed torch\.float8_e4m3fn bytes, got torch\.float32"):
        small().load_state_dict(nn.Linear(96, 7).state_dict())


def test_missing_unexpected_and_misshapen_tensors_are_reported_as_ever() -> None:
    state = small().state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_scale"'):
        small().load_state_dict({k: v for k, v in state.items() if k != "weight_scale"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "extra"'):
        small().load_state_dict({**state, "extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        small().load_state_dict({**state, "weight_scale": torch.ones(7, 4, dtype=torch.uint8)})


# --- what happens to a module --------------------------------------------------------------------------

CONVERSIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to device and dtype": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to like a tensor": (lambda m: m.to(torch.ones(1, dtype=torch.float64)), torch.float64),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.float(), torch.float32),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "there and back": (lambda m: m.half().double().to(torch.float32), torch.float32),
    "cpu": (lambda m: m.cpu(), torch.float32),
    "share_memory": (lambda m: m.share_memory(), torch.float32),
    "requires_grad": (lambda m: m.requires_grad_(False), torch.float32),
    "train and eval": (lambda m: m.train().eval(), torch.float32),
    "deepcopy": (copy.deepcopy, torch.float32),
    "copy": (copy.copy, torch.float32),
    "pickle": (lambda m: pickle.loads(pickle.dumps(m)), torch.float32),
    "torch.save": (lambda m: saved_and_loaded(m, weights_only=False), torch.float32),
    "deepcopy of a copy": (lambda m: copy.deepcopy(copy.copy(m)), torch.float32),
    "pickle of a copy": (lambda m: pickle.loads(pickle.dumps(copy.copy(m))), torch.float32),
}


@pytest.mark.parametrize(("convert", "bias_dtype"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_no_conversion_changes_a_byte(convert: Callable[[nn.Module], nn.Module], bias_dtype: torch.dtype) -> None:
    module = convert(every_code())
    assert isinstance(module, Mxfp8Linear)
    assert_every_code(module)
    assert module.bias is not None
    assert_same(module.bias, torch.arange(256.0).to(bias_dtype))
    inner = convert(nn.Sequential(every_code(bias=False)))
    assert_every_code(inner[0])  # type: ignore[index]


def test_a_converted_module_takes_the_new_activations() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.bfloat16)
    assert_same(small().to(torch.bfloat16)(x), mxfp8_ops.linear(x, weight, scale, bias))


def test_moving_to_another_device_keeps_the_dtypes() -> None:
    for module in (every_code().to("meta"), every_code().half().to_empty(device="meta")):
        assert (module.weight.dtype, module.weight_scale.dtype) == (torch.float8_e4m3fn, torch.uint8)
        assert {t.device.type for t in module.state_dict().values()} == {"meta"}
        empty = module.to_empty(device="cpu")
        empty.load_state_dict(every_code().state_dict())
        assert_every_code(empty)


def test_shared_memory_is_shared() -> None:
    module = every_code().share_memory()
    assert module.weight.is_shared()
    assert module.weight_scale.is_shared()


def test_layers_that_share_a_weight_share_it_still_afterwards() -> None:
    weight, scale = all_codes()
    first = Mxfp8Linear.from_quantized(nn.Parameter(weight, requires_grad=False), scale)
    pair = nn.Sequential(first, Mxfp8Linear.from_quantized(first.weight, scale))
    for name in ("half", "deepcopy", "pickle", "torch.save"):
        converted = CONVERSIONS[name][0](pair)
        assert converted[0].weight is converted[1].weight, name  # type: ignore[index]
        assert_every_code(converted[1])  # type: ignore[index]


def test_copies_are_independent_where_copies_should_be() -> None:
    module = every_code()
    deep, shallow = copy.deepcopy(module), copy.copy(module)
    assert shallow.weight is module.weight
    with torch.no_grad():
        deep.weight.view(torch.uint8).fill_(1)
    assert_every_code(module)
    assert bits(deep.weight).unique().tolist() == [1]


def test_the_bias_trains_as_that_of_a_dense_linear() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.float32)
    module = small()
    dense = nn.Linear(96, 7)
    with torch.no_grad():
        dense.weight.copy_(mxfp8_ops.dequant(weight, scale, torch.float32))
        dense.bias.copy_(bias)
    before = [t.clone() for t in (module.weight, module.weight_scale)]
    for model in (module, dense.requires_grad_(False)):
        assert model.bias is not None
        model.bias.requires_grad_()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.25)
        model(x).square().sum().backward()
        optimizer.step()
    assert module.bias is not None
    assert (module.bias != bias).any()
    assert_same(module.bias, dense.bias)
    assert_same(module.weight, before[0])
    assert_same(module.weight_scale, before[1])


def test_functional_call_sees_the_module_as_any_other() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.float32)
    y = torch.func.functional_call(small(), {"bias": -bias}, (x,))
    assert_same(y, mxfp8_ops.linear(x, weight, scale, -bias))
