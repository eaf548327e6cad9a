"""The vLLM-shaped kernel class, branch by branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_codes, assert_same, exact_linear_inputs, expected_from_float64
from torch import Tensor, nn

import mxfp8_ops
from mxfp8_ops.emulation import EmulationMxfp8LinearKernel, Mxfp8LinearKernel, Mxfp8LinearLayerConfig

N, K = 7, 96
FIRST, SECOND = "MXFP8_DEQUANT_AT_LOAD", "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel(dequant_at_load: bool | None = None) -> EmulationMxfp8LinearKernel:
    return EmulationMxfp8LinearKernel(Mxfp8LinearLayerConfig(weight_shape=(N, K)), dequant_at_load)


def loaded(weight: Tensor | None = None, scale: Tensor | None = None, buffer: bool = False) -> nn.Module:
    """A layer as a loader leaves it."""
    _, good_weight, good_scale, _ = exact_linear_inputs(1, N, K, torch.float32)
    layer = nn.Module()
    layer.weight = nn.Parameter(good_weight if weight is None else weight, requires_grad=False)
    scale = good_scale if scale is None else scale
    if buffer:
        layer.register_buffer("weight_scale", scale)
    else:
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    return layer


def padded(scale: Tensor, fill: int = 255) -> Tensor:
    """Swollen to a multiple of 128 rows and 4 columns, as MX hardware wants it; the padding is NaN."""
    rows, columns = scale.shape
    return F.pad(scale, (0, -columns % 4, 0, -rows % 128), value=fill)


# --- what the loader asks first ------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [None, 75, 80, 90, 100])
def test_it_is_supported_everywhere(capability: int | None) -> None:
    assert EmulationMxfp8LinearKernel.is_supported(capability) == (True, None)
    assert EmulationMxfp8LinearKernel.is_supported() == (True, None)


@pytest.mark.parametrize("shape", [(N, K), (1, 32), (8192, 28672), (3, 33)])
def test_it_can_implement_every_layer(shape: tuple[int, int]) -> None:
    config = Mxfp8LinearLayerConfig(weight_shape=shape)
    assert EmulationMxfp8LinearKernel.can_implement(config) == (True, None)
    assert EmulationMxfp8LinearKernel(config).config is config


def test_the_base_class_leaves_everything_to_its_kernels() -> None:
    assert issubclass(EmulationMxfp8LinearKernel, Mxfp8LinearKernel)
    with pytest.raises(TypeError, match="abstract"):
        Mxfp8LinearKernel(Mxfp8LinearLayerConfig((N, K)))  # type: ignore[abstract]


# --- processing ----------------------------------------------------------------------------------------


def test_unset_flag_dequantizes_every_code_to_bfloat16() -> None:
    weight, scale = all_codes()
    layer = loaded(weight, scale)
    kernel().process_weights_after_loading(layer)
    assert_same(layer.weight, expected_from_float64(weight, scale, torch.bfloat16))
    assert_same(layer.weight_scale, scale)


def test_flag_off_keeps_every_byte() -> None:
    weight, scale = all_codes()
    layer = loaded(weight, scale)
    kernel(False).process_weights_after_loading(layer)
    assert_same(layer.weight, weight)
    assert_same(layer.weight_scale, scale)


@pytest.mark.parametrize(
    ("environment", "keyword", "dtype"),
    [
        ({}, None, torch.bfloat16),
        ({}, True, torch.bfloat16),
        ({}, False, torch.float8_e4m3fn),
        ({FIRST: "1"}, None, torch.bfloat16),
        ({FIRST: "0"}, None, torch.float8_e4m3fn),
        ({SECOND: "yes"}, None, torch.bfloat16),
        ({SECOND: "off"}, None, torch.float8_e4m3fn),
        ({FIRST: "on", SECOND: "off"}, None, torch.bfloat16),
        ({FIRST: "off", SECOND: "on"}, None, torch.float8_e4m3fn),
        ({FIRST: "on"}, False, torch.float8_e4m3fn),
        ({FIRST: "off"}, True, torch.bfloat16),
        ({FIRST: "nonsense"}, True, torch.bfloat16),
    ],
)
def test_the_flag_decides_what_the_weight_becomes(
    environment: dict[str, str], keyword: bool | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_before = kernel(keyword)  # the flag is read when weights are processed, not when the kernel is made
    for name, word in environment.items():
        monkeypatch.setenv(name, word)
    layer = loaded()
    made_before.process_weights_after_loading(layer)
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_bad_word_names_the_variable_and_leaves_the_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "perhaps")
    layer = loaded()
    weight, scale = layer.weight, layer.weight_scale
    with pytest.raises(ValueError, match=f"{name} must be .* got 'perhaps'"):
        kernel().process_weights_after_loading(layer)
    assert layer.weight is weight
    assert layer.weight_scale is scale


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("e8m0", [True, False])
def test_a_padded_scale_is_trimmed_in_any_form(flag: bool, buffer: bool, e8m0: bool) -> None:
    x, weight, scale, bias = exact_linear_inputs(5, N, K, torch.bfloat16)
    swollen = padded(scale)
    assert swollen.shape == (128, 4)
    layer = loaded(weight, swollen.view(torch.float8_e8m0fnu) if e8m0 else swollen, buffer)
    kernel(flag).process_weights_after_loading(layer)
    assert_same(layer.weight_scale, scale)
    assert layer.weight_scale.is_contiguous()
    y = kernel(flag).apply_weights(layer, x, bias)
    assert_same(y, mxfp8_ops.linear(x, weight, scale, bias))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("buffer", [True, False])
def test_processed_tensors_are_contiguous_frozen_parameters(flag: bool, buffer: bool) -> None:
    _, weight, scale, _ = exact_linear_inputs(1, N, K, torch.float32)
    strided = weight.view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)
    layer = loaded(strided, scale.t().contiguous().t(), buffer)
    layer.weight.requires_grad_()
    kernel(flag).process_weights_after_loading(layer)
    assert dict(layer.named_parameters()).keys() == {"weight", "weight_scale"}
    assert not dict(layer.named_buffers())
    for parameter, value in (
        (layer.weight, mxfp8_ops.dequant(weight, scale) if flag else weight),
        (layer.weight_scale, scale),
    ):
        assert type(parameter) is nn.Parameter
        assert parameter.is_contiguous()
        assert not parameter.requires_grad
        assert_same(parameter, value)


@pytest.mark.parametrize("flag", [True, False])
def test_processing_twice_is_processing_once(flag: bool) -> None:
    layer = loaded(scale=padded(exact_linear_inputs(1, N, K, torch.float32)[2]))
    kernel(flag).process_weights_after_loading(layer)
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    kernel(flag).process_weights_after_loading(layer)
    assert_same(layer.weight, weight)
    assert_same(layer.weight_scale, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_weight_is_left_alone(dtype: torch.dtype) -> None:
    layer = nn.Module()
    weight = layer.weight = nn.Parameter(torch.ones(N, K, dtype=dtype))
    kernel().process_weights_after_loading(layer)
    assert layer.weight is weight
    assert weight.requires_grad
    assert not hasattr(layer, "weight_scale")


BAD_LAYERS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "weight of bytes": (lambda: loaded(torch.ones(N, K, dtype=torch.uint8)), TypeError, "must be float8_e4m3fn"),
    "float scale": (lambda: loaded(scale=torch.ones(N, 3)), TypeError, "E8M0 bytes"),
    "1-D scale": (lambda: loaded(scale=torch.ones(512, dtype=torch.uint8)), ValueError, "swizzled"),
    "scale too small": (lambda: loaded(scale=torch.ones(N, 2, dtype=torch.uint8)), ValueError, r"must be \[7, 3\]"),
    "too few rows of scale": (lambda: loaded(scale=torch.ones(3, 3, dtype=torch.uint8)), ValueError, r"got \[3, 3\]"),
    "K not a multiple": (
        lambda: loaded(torch.zeros(N, 40).to(torch.float8_e4m3fn), torch.ones(N, 2, dtype=torch.uint8)),
        ValueError,
        "K=40",
    ),
    "weight of rank 3": (
        lambda: loaded(torch.zeros(2, N, K).to(torch.float8_e4m3fn), torch.ones(2, N, 3, dtype=torch.uint8)),
        ValueError,
        r"\[N, K\].*\[2, 7, 96\]",
    ),
    "weight of rank 1": (
        lambda: loaded(torch.zeros(K).to(torch.float8_e4m3fn), torch.ones(3, dtype=torch.uint8)),
        ValueError,
        r"\[N, K\].*\[96\]",
    ),
}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("make", "error", "words"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_a_bad_layer_is_refused_and_left_untouched(
    make: Callable[[], nn.Module], error: type[Exception], words: str, flag: bool
) -> None:
    layer = make()
    weight, scale = layer.weight, layer.weight_scale
    before = weight.clone(), scale.clone()
    with pytest.raises(error, match=words):
        kernel(flag).process_weights_after_loading(layer)
    assert layer.weight is weight
    assert layer.weight_scale is scale
    assert_same(weight, before[0])
    assert_same(scale, before[1])


# --- applying ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_applying_is_the_packed_linear_either_way(dtype: torch.dtype, with_bias: bool, flag: bool) -> None:
    x, weight, scale, bias = exact_linear_inputs(5, N, K, dtype)
    layer = loaded(weight, padded(scale))
    kernel(flag).process_weights_after_loading(layer)
    arguments: tuple[Any, ...] = (bias,) if with_bias else ()
    expected = mxfp8_ops.linear(x, weight, scale, *arguments)
    assert_same(kernel(flag).apply_weights(layer, x, *arguments), expected)
    batched = kernel(flag).apply_weights(layer, x.reshape(5, 1, K), *arguments)
    assert_same(batched, expected.reshape(5, 1, N))


@pytest.mark.parametrize("wide", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_weight_is_cast_to_the_dtype_of_x(dtype: torch.dtype, wide: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(5, N, K, dtype)
    layer = nn.Module()
    layer.weight = nn.Parameter(mxfp8_ops.dequant(weight, scale, wide), requires_grad=False)
    assert_same(kernel().apply_weights(layer, x, bias), mxfp8_ops.linear(x, weight, scale, bias))


@pytest.mark.parametrize(
    ("scale", "got"),
    [
        (torch.ones(N, 3), "torch.float32"),
        (torch.ones(N, 3, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.full((N, 3), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu), "torch.float8_e8m0fnu"),
    ],
)
def test_a_scale_that_is_not_bytes_says_what_to_call_first(scale: Tensor, got: str) -> None:
    words = rf"weight_scale must be uint8 E8M0 bytes, got {got}: call process_weights_after_loading\(layer\) first"
    with pytest.raises(ValueError, match=words):
        kernel(False).apply_weights(loaded(scale=scale), torch.ones(5, K))


@pytest.mark.parametrize("shape", [(512,), (1, N, 3), ()])
def test_a_scale_that_is_not_2d_says_what_to_call_first(shape: tuple[int, ...]) -> None:
    words = rf"must be 2-D \[N, K/32\], got {len(shape)}-D .*call process_weights_after_loading\(layer\) first"
    with pytest.raises(ValueError, match=words):
        kernel(False).apply_weights(loaded(scale=torch.ones(shape, dtype=torch.uint8)), torch.ones(5, K))


def test_the_weight_stays_packed_from_call_to_call() -> None:
    layer = loaded()
    kernel(False).process_weights_after_loading(layer)
    before = layer.weight, layer.weight.clone(), layer.weight_scale.clone()
    for _ in range(2):
        kernel(False).apply_weights(layer, torch.ones(5, K))
    assert layer.weight is before[0]
    assert_same(layer.weight, before[1])
    assert_same(layer.weight_scale, before[2])
