"""``release_quantized=True``: the packed bytes go, the compiled model stays."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same
from models import Chain, folding, layer, rows
from torch import nn

from lowering import released, report

ON = {"dequant_at_load": True, "release_quantized": True}
RELEASED = "this MXFP8 weight was released"


def release(model: nn.Module) -> Callable[..., Any]:
    compiled = torch.compile(model, backend=folding(**ON), fullgraph=True)
    compiled(rows())
    return compiled


def save(model: nn.Module) -> None:
    torch.save(model.state_dict(), io.BytesIO())


def test_answers_stay_those_of_the_packed_weights_through_calls_and_recompiles() -> None:
    model = Chain()
    expected = {m: model(rows(m)) for m in (1, 2, 5, 9)}
    compiled = torch.compile(model, backend="mxfp8", options=ON, fullgraph=True)
    for m in (5, 5, 9, 2, 1):
        assert_same(compiled(rows(m)), expected[m])
    torch._dynamo.reset()
    again = torch.compile(model, backend="mxfp8", options=ON | {"release_quantized": False}, fullgraph=True)
    assert_same(again(rows(9)), expected[9])


def test_packed_bytes_are_freed_and_counted() -> None:
    model = layer()
    packed = model.weight.nbytes
    with report.collect() as graphs:
        release(model)
    (weight,) = graphs[0].weights
    with torch._C.DisableTorchFunctionSubclass():
        assert model.weight.untyped_storage().nbytes() == 0
        assert model.weight_scale.untyped_storage().nbytes() == 0
    assert weight.bytes_before == packed + packed // 32
    assert weight.bytes_after == 2 * packed


def test_metadata_of_a_released_weight_can_be_read() -> None:
    model = layer(48, 64)
    release(model)
    weight = model.weight
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((48, 64), torch.float8_e4m3fn, "cpu")
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.stride() == (64, 1)
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    assert sum(parameter.numel() for parameter in model.parameters()) == 48 * 64 + 48


EAGER_USES = [
    lambda model: model(rows()),
    lambda model: model.weight.float(),
    lambda model: model.weight.view(torch.uint8),
    lambda model: torch.cat([model.weight, model.weight]),
    lambda model: model.weight.data,
    lambda model: model.weight.data_ptr(),
    lambda model: model.weight.untyped_storage(),
    lambda model: repr(model.weight),
    lambda model: model.state_dict(),
    save,
    lambda model: copy.deepcopy(model),
    lambda model: pickle.dumps(model),
    lambda model: model.to("meta"),
    lambda model: model.half(),
    lambda model: model.load_state_dict(layer().state_dict()),
    lambda model: torch.ops.mxfp8.dequant(model.weight, model.weight_scale, torch.bfloat16),
]


@pytest.mark.parametrize("use", EAGER_USES)
def test_eager_use_of_a_released_weight_is_a_clear_error(use: Callable[[nn.Module], object]) -> None:
    model = layer()
    compiled = release(model)
    expected = compiled(rows())
    with pytest.raises((ValueError, RuntimeError), match=RELEASED):
        use(model)
    assert_same(compiled(rows()), expected)


def test_plain_tensors_are_released_too() -> None:
    packed = layer()
    weight, scale, expected = packed.weight.detach(), packed.weight_scale.detach(), packed(rows())

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mxfp8.linear(x, weight, scale, packed.bias)

    compiled = release(model)
    assert_same(compiled(rows()), expected)
    assert_same(packed(rows()), expected)  # another tensor on the same memory is untouched
    with pytest.raises(ValueError, match=RELEASED):
        weight.float()


def test_weight_that_the_graph_reads_otherwise_is_not_released() -> None:
    packed = layer()

    def model(x: torch.Tensor) -> torch.Tensor:
        return packed(x) + packed.weight.float().sum().to(x.dtype)

    compiled = release(model)
    assert not released.is_released(packed.weight)
    assert_same(compiled(rows()), model(rows()))


def test_weight_used_in_two_dtypes_is_released_after_both() -> None:
    packed = layer(bias=False)

    def model(x: torch.Tensor) -> list[torch.Tensor]:
        return [packed(x), packed(x.float())]

    expected = model(rows())
    compiled = release(model)
    assert released.is_released(packed.weight)
    for actual, each in zip(compiled(rows()), expected, strict=True):
        assert_same(actual, each)


def test_released_weight_cannot_be_made_in_another_dtype() -> None:
    packed = layer(bias=False)
    release(packed)
    with pytest.raises(Exception, match=r"was released .* cannot be dequantized to float32 again"):
        torch.compile(packed, backend=folding(**ON), fullgraph=True)(rows().float())


def test_graph_with_the_flag_off_says_that_the_weight_is_gone() -> None:
    packed = layer()
    release(packed)
    message = r"weight was released \(release_quantized=True\).*the flag is not on.*dequantized to bfloat16, or load"
    with pytest.raises(Exception, match=message):
        torch.compile(packed, backend=folding(dequant_at_load=False), fullgraph=True)(rows())


def test_changed_scale_of_a_released_weight_is_a_clear_error() -> None:
    packed = layer()
    changed = packed.weight_scale + 1
    compiled = release(packed)
    packed.weight_scale = changed
    with pytest.raises(Exception, match=r"was released .* cannot be dequantized to bfloat16 again"):
        compiled(rows())


def test_scale_that_another_weight_needs_is_not_released_and_its_change_is_a_clear_error() -> None:
    packed, other = layer(bias=False), layer(bias=False, seed=9)
    other.weight_scale = packed.weight_scale

    def model(x: torch.Tensor) -> torch.Tensor:
        return packed(x) + other(x) + other.weight.float().sum().to(x.dtype) + other.weight_scale.sum().to(x.dtype)

    compiled = release(model)
    assert released.is_released(packed.weight)
    assert not released.is_released(packed.weight_scale)
    packed.weight_scale.add_(1)
    with pytest.raises(ValueError, match="the scale of a released MXFP8 weight was changed"):
        compiled(rows())


def test_new_parameter_in_place_of_a_released_one_is_folded_and_released_in_its_turn() -> None:
    packed, other = layer(), layer(seed=9)
    expected = other(rows())
    compiled = release(packed)
    packed.weight = nn.Parameter(other.weight.detach().clone(), requires_grad=False)
    packed.weight_scale, packed.bias = other.weight_scale, other.bias
    assert_same(compiled(rows()), expected)
    assert released.is_released(packed.weight)


def test_nothing_is_released_while_the_flag_is_off() -> None:
    packed = layer()
    expected = packed(rows())
    compiled = torch.compile(packed, backend=folding(dequant_at_load=False, release_quantized=True), fullgraph=True)
    assert_same(compiled(rows()), expected)
    assert_same(packed(rows()), expected)


def test_released_weights_train_on_through_their_compiled_graph() -> None:
    model = layer(dtype=torch.float32)
    x = rows(dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    compiled = torch.compile(model, backend="mxfp8", options=ON, fullgraph=True)
    for _ in range(2):
        (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
        assert_same(actual, expected)
