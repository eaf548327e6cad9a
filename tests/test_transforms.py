"""Gradients, torch.func and autocast: linear must behave as F.linear on the dequantized weight does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, exact_linear_inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import mxfp8_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_and_dense(n: int = 7, k: int = 96, dtype: torch.dtype = torch.float32) -> tuple[Callable, Callable]:
    """Two functions of (x, bias) that must not be told apart."""
    _, weight, scale, _ = exact_linear_inputs(1, n, k, dtype)
    dense = mxfp8_ops.dequant(weight, scale, dtype)
    return lambda x, bias: mxfp8_ops.linear(x, weight, scale, bias), lambda x, bias: F.linear(x, dense, bias)


def inputs(m: int = 3, n: int = 7, k: int = 96, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, _, _, bias = exact_linear_inputs(m, n, k, dtype)
    return x, bias


def loss(linear: Callable, *bias: Tensor) -> Callable[..., Tensor]:
    """A scalar of x (and bias) whose second derivatives are not zero."""
    return lambda x, *rest: linear(x, *(rest or bias)).square().sum()


def assert_all_same(actual: Any, expected: Any) -> None:
    for a, e in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert_same(a, e)


# --- autograd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (3, 96), (2, 3, 96), (0, 96)])
def test_gradients_of_x_and_bias_are_those_of_the_dense_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = max(1, torch.Size(shape[:-1]).numel())
    x, bias = inputs(rows, dtype=dtype)
    x = x[: torch.Size(shape[:-1]).numel()].reshape(shape).requires_grad_()
    bias.requires_grad_()
    got, expected = (
        torch.autograd.grad(f(x, bias), (x, bias), torch.ones(*shape[:-1], 7, dtype=dtype))
        for f in packed_and_dense(dtype=dtype)
    )
    assert_all_same(got, expected)


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_a_gradient_is_made_only_where_it_is_wanted(wanted: str) -> None:
    x, bias = inputs()
    tensor = {"x": x, "bias": bias}[wanted].requires_grad_()
    results = []
    for f in packed_and_dense():
        y = f(x, bias)
        assert y.requires_grad
        results.append(torch.autograd.grad(y.sum(), tensor))
    assert_all_same(*results)


def test_no_graph_is_kept_without_need() -> None:
    x, bias = inputs()
    packed, _ = packed_and_dense()
    assert packed(x, bias).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert packed(x, bias).grad_fn is None


def test_second_order_gradients_are_those_of_the_dense_linear() -> None:
    x, bias = (t.requires_grad_() for t in inputs())
    results = []
    for f in packed_and_dense():
        first = torch.autograd.grad(f(x, bias).square().sum(), (x, bias), create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1].sum(), (x, bias))
        results.append((first, second))
    assert any((g != 0).any() for g in results[0][1])
    assert_all_same(*results)


def test_gradients_agree_with_finite_differences() -> None:
    # Exact for a linear function: differences of exactly representable values, divided by a power of two.
    x, bias = inputs()
    packed, _ = packed_and_dense()
    gradient = torch.func.grad(lambda x: packed(x, bias).sum())(x)
    for i in (0, 40, 95):
        step = torch.zeros_like(x)
        step[1, i] = 0.5
        slope = (packed(x + step, bias).sum() - packed(x - step, bias).sum()).item()
        assert gradient[1, i].item() == slope


@pytest.mark.parametrize("call", ["linear", "dequant"])
def test_a_weight_that_wants_a_gradient_is_refused(call: str) -> None:
    x, weight, scale, _ = exact_linear_inputs(3, 7, 96, torch.float32)
    weight.requires_grad_()
    function = {
        "linear": lambda: mxfp8_ops.linear(x, weight, scale),
        "dequant": lambda: mxfp8_ops.dequant(weight, scale),
    }[call]
    with pytest.raises(ValueError, match=r"MXFP8 weight is frozen .*requires_grad_\(False\)"):
        function()
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="MXFP8 weight is frozen"):
        torch.compile(function, backend="eager", fullgraph=True)()
    with torch.no_grad():
        expected = function()
    weight.requires_grad_(False)
    assert_same(function(), expected)


def with_a_tangent(function: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(weight, weight))


WITH_RESPECT_TO_THE_WEIGHT: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, w: grad(lambda w: f(w).sum())(w),
    "vjp": lambda f, w: vjp(f, w),
    "jacrev": lambda f, w: jacrev(f)(w),
    "jvp": lambda f, w: jvp(f, (w,), (w,)),
    "grad of vmap": lambda f, w: grad(lambda w: vmap(lambda c: c * f(w))(torch.ones(2)).sum())(w),
    "vmap of grad": lambda f, w: vmap(grad(lambda w: f(w).sum()))(w.expand(2, *w.shape)),
    "dual tensor": lambda f, w: with_a_tangent(f, w),
}


@pytest.mark.parametrize("call", ["linear", "dequant"])
@pytest.mark.parametrize("transform", WITH_RESPECT_TO_THE_WEIGHT.values(), ids=WITH_RESPECT_TO_THE_WEIGHT)
def test_no_transform_gives_a_silent_zero_for_the_weight(transform: Callable, call: str) -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.float32)
    function = {
        "linear": lambda w: mxfp8_ops.linear(x, w, scale, bias),
        "dequant": lambda w: mxfp8_ops.dequant(w, scale, torch.float32),
    }[call]
    with pytest.raises(ValueError, match="MXFP8 weight is frozen and cannot have a gradient"):
        transform(function, weight)


def test_gradients_pass_through_the_compiler() -> None:
    x, bias = (t.requires_grad_() for t in inputs())
    packed, dense = packed_and_dense()
    compiled = torch.compile(packed, fullgraph=True)
    got, expected = (torch.autograd.grad(f(x, bias).square().sum(), (x, bias)) for f in (compiled, dense))
    assert_all_same(got, expected)


# --- torch.func ----------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, b: grad(loss(f), argnums=(0, 1))(x, b),
    "grad of x alone": lambda f, x, b: grad(loss(f, b))(x),
    "grad of grad": lambda f, x, b: grad(lambda x: grad(loss(f, b))(x).sum())(x),
    "vjp": lambda f, x, b: vjp(f, x, b)[1](torch.ones(3, 7)),
    "jvp of both": lambda f, x, b: jvp(f, (x, b), (x.flip(0), b.flip(0))),
    "jvp of x": lambda f, x, b: jvp(lambda x: f(x, b), (x,), (x.flip(0),)),
    "jvp of bias": lambda f, x, b: jvp(lambda b: f(x, b), (b,), (b.flip(0),)),
    "jvp of grad": lambda f, x, b: jvp(grad(loss(f, b)), (x,), (x.flip(0),)),
    "jacrev": lambda f, x, b: jacrev(f, argnums=(0, 1))(x, b),
    "jacfwd": lambda f, x, b: jacfwd(f, argnums=(0, 1))(x, b),
    "hessian": lambda f, x, b: hessian(loss(f, b))(x[0]),
    "vmap over rows": lambda f, x, b: vmap(f, (0, None))(x, b),
    "vmap over columns of outputs": lambda f, x, b: vmap(f, (0, None), out_dims=1)(x, b),
    "vmap over an inner axis": lambda f, x, b: vmap(f, (1, None))(torch.stack([x, x.flip(0)], 1), b),
    "vmap over x and bias": lambda f, x, b: vmap(f)(x, torch.stack([b, b.flip(0), -b])),
    "vmap over bias": lambda f, x, b: vmap(f, (None, 0))(x, torch.stack([b, b.flip(0), -b])),
    "vmap over bias, inner axis": lambda f, x, b: vmap(f, (None, 1))(x, torch.stack([b, -b], 1)),
    "vmap of vmap": lambda f, x, b: vmap(vmap(f, (0, None)), (0, None))(torch.stack([x, -x]), b),
    "vmap of grad": lambda f, x, b: vmap(grad(loss(f), argnums=(0, 1)), (0, None))(x, b),
    "vmap of grad over both": lambda f, x, b: vmap(grad(loss(f), argnums=(0, 1)))(x, torch.stack([b, -b, b])),
    "grad of vmap": lambda f, x, b: grad(lambda x: vmap(loss(f, b))(x).sum())(x),
    "vmap of jvp": lambda f, x, b: vmap(lambda x: jvp(lambda x: f(x, b), (x,), (x,)))(x),
}
COMPILED = ("grad", "grad of grad", "jvp of both", "jacrev", "vmap over rows", "vmap of grad", "vmap over x and bias")


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformed_linear_is_the_transformed_dense_linear(transform: Callable) -> None:
    packed, dense = packed_and_dense()
    assert_all_same(transform(packed, *inputs()), transform(dense, *inputs()))


@pytest.mark.parametrize("name", COMPILED)
def test_transforms_compile(name: str) -> None:
    packed, dense = packed_and_dense()
    compiled = torch.compile(lambda x, b: TRANSFORMS[name](packed, x, b), fullgraph=True, backend="aot_eager")
    assert_all_same(compiled(*inputs()), TRANSFORMS[name](dense, *inputs()))


def test_compiled_gradient_function_runs_under_inductor() -> None:
    packed, dense = packed_and_dense()
    compiled = torch.compile(lambda x, b: TRANSFORMS["grad"](packed, x, b), fullgraph=True)
    assert_all_same(compiled(*inputs()), TRANSFORMS["grad"](dense, *inputs()))


def test_vmap_over_weights_is_one_linear_for_each() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.float32)
    weights, scales = (torch.stack([t, t.flip(0)]) for t in (weight.view(torch.uint8), scale))
    weights = weights.view(torch.float8_e4m3fn)
    expected = torch.stack([mxfp8_ops.linear(x, w, s, bias) for w, s in zip(weights, scales, strict=True)])
    mapped = vmap(lambda w, s: mxfp8_ops.linear(x, w, s, bias))(weights, scales)
    assert_same(mapped, expected)
    assert_same(vmap(lambda w: mxfp8_ops.linear(x, w, scale, bias))(weights)[0], expected[0])


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if "vmap" in name])
def test_vmap_over_x_and_bias_needs_no_slow_fallback(name: str) -> None:
    torch._C._functorch._set_vmap_fallback_enabled(False)  # from now on the fallback raises
    try:
        TRANSFORMS[name](packed_and_dense()[0], *inputs())
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)


# --- forward-mode AD outside torch.func ----------------------------------------------------------------


@pytest.mark.parametrize("dual", ["x", "bias", "both"])
def test_dual_tensors_carry_the_tangent_of_the_dense_linear(dual: str) -> None:
    results = []
    for f in packed_and_dense():
        x, bias = inputs()
        with forward_ad.dual_level():
            if dual != "bias":
                x = forward_ad.make_dual(x, x.flip(0))
            if dual != "x":
                bias = forward_ad.make_dual(bias, bias.flip(0))
            results.append(tuple(forward_ad.unpack_dual(f(x, bias))))
    assert_all_same(*results)


def test_a_dual_level_without_tangents_gives_none() -> None:
    packed, dense = packed_and_dense()
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(packed(*inputs()))
    assert y.tangent is None
    assert_same(y.primal, dense(*inputs()))


# --- autocast ------------------------------------------------------------------------------------------


class SeenByKernels(TorchDispatchMode):
    """Records the dtypes that reach mxfp8::linear below autocast and autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[list[torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mxfp8.linear.default:
            self.dtypes.append([a.dtype for a in args if a is not None])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_casts_x_and_bias_and_never_the_weight(dtype: torch.dtype, low: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, dtype)
    for args in ((x, weight, scale, bias), (x, weight, scale)):
        with torch.autocast("cpu", low), SeenByKernels() as seen:
            y = mxfp8_ops.linear(*args)
        assert seen.dtypes == [[low, torch.float8_e4m3fn, torch.uint8] + [low] * (len(args) - 3)]
        dense = mxfp8_ops.dequant(weight, scale, dtype)
        with torch.autocast("cpu", low):
            expected = F.linear(x, dense, *args[3:])
        assert y.dtype == low
        assert_same(y, expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_compiled_autocast_equals_eager_autocast(low: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.float32)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", low):
            return mxfp8_ops.linear(x, weight, scale, bias)

    with torch.autocast("cpu", low):
        expected = mxfp8_ops.linear(x, weight, scale, bias)
        with torch._inductor.config.patch(force_disable_caches=True):  # torch 2.11 mixes up bfloat16 and float16
            around = torch.compile(lambda x: mxfp8_ops.linear(x, weight, scale, bias), fullgraph=True)(x)
    assert expected.dtype == low
    assert_same(around, expected)
    assert_same(torch.compile(inside, fullgraph=True)(x), expected)


def test_autocast_gradients_come_back_in_the_dtype_of_the_inputs() -> None:
    x, bias = (t.requires_grad_() for t in inputs())
    results = []
    for f in packed_and_dense():
        with torch.autocast("cpu", torch.bfloat16):
            y = f(x, bias)
        results.append(torch.autograd.grad(y.sum(), (x, bias)))
    assert [g.dtype for g in results[0]] == [torch.float32, torch.float32]
    assert_all_same(*results)


def test_autocast_can_be_switched_off_inside() -> None:
    x, bias = inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert packed_and_dense()[0](x, bias).dtype == torch.float32


def test_autocast_reaches_into_vmap_and_grad() -> None:
    x, bias = inputs()
    packed, _ = packed_and_dense()
    with torch.autocast("cpu", torch.bfloat16):
        expected = packed(x, bias)
        assert_same(vmap(packed, (0, None))(x, bias), expected)
        gradient = grad(lambda x: packed(x, bias).sum())(x)
    assert expected.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32


def test_autocast_does_not_hide_a_float64_x() -> None:
    _, weight, scale, _ = exact_linear_inputs(3, 7, 96, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be float32, bfloat16 or"):
        mxfp8_ops.linear(torch.ones(3, 96, dtype=torch.float64), weight, scale)


def test_autocast_leaves_dequant_and_quantize_alone() -> None:
    x, weight, scale, _ = exact_linear_inputs(3, 7, 96, torch.float32)
    expected = mxfp8_ops.quantize(x), mxfp8_ops.dequant(weight, scale, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_same((mxfp8_ops.quantize(x), mxfp8_ops.dequant(weight, scale, torch.float32)), expected)
