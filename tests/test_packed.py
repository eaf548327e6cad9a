"""The operators on packed weights: linear_packed is linear, under every transform and compiler."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from test_packing import assert_all_same, random_codes, strided, strided_weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map_only

import mxfp8_ops

OPS = torch.ops.mxfp8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def leading_dimensions(x: Tensor) -> Iterator[Tensor]:
    yield x
    yield x[0]
    yield x[:0]
    yield x.new_empty(2, 0, x.shape[1])
    yield x.unsqueeze(1)
    yield torch.stack([x, x.flip(0)]).transpose(0, 1)
    yield from strided(x)


# --- linear_packed -------------------------------------------------------------------------------------


def both(n: int = 7, k: int = 96, dtype: torch.dtype = torch.float32) -> tuple[Callable, Callable]:
    """Two functions of (x, bias) that must not be told apart: linear_packed and linear."""
    _, weight, scale, _ = exact_linear_inputs(1, n, k, dtype)
    packed = mxfp8_ops.pack(weight, scale)
    return (
        lambda x, bias: mxfp8_ops.linear_packed(x, packed, n, bias),
        lambda x, bias: mxfp8_ops.linear(x, weight, scale, bias),
    )


@pytest.mark.parametrize("packed_for", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_packed_for_either_dtype_gives_the_same_for_x_of_any(
    dtype: torch.dtype, packed_for: torch.dtype
) -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 130, 288, dtype)
    packed = mxfp8_ops.pack(weight, scale, packed_for)
    expected = mxfp8_ops.linear(x, weight, scale, bias)
    assert_same(mxfp8_ops.linear_packed(x, packed, 130, bias), expected)
    compiled = torch.compile(lambda w, s: mxfp8_ops.linear_packed(x, mxfp8_ops.pack(w, s, packed_for), 130, bias))
    assert_same(compiled(weight, scale), expected)


def inputs(m: int = 3, n: int = 7, k: int = 96, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, _, _, bias = exact_linear_inputs(m, n, k, dtype)
    return x, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (7, 96), (65, 160), (130, 288)])
def test_linear_packed_is_linear_of_the_reference(n: int, k: int, dtype: torch.dtype) -> None:
    weight, scale = random_codes(n, k)
    packed = mxfp8_ops.pack(weight, scale)
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, k), (n,)))
    for rows, offset in itertools.product(leading_dimensions(x), (bias, None)):
        y = mxfp8_ops.linear_packed(rows, packed, n, offset)
        assert_same(y, mxfp8_ops.reference.linear(rows, weight, scale, offset))
        assert y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 3, 96), (0, 96)])
def test_gradients_are_those_of_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = inputs(6, dtype=dtype)
    x = x[: torch.Size(shape[:-1]).numel()].reshape(shape)
    wanted = x.requires_grad_(), bias.requires_grad_()
    results = [
        torch.autograd.grad(f(x, bias), wanted, torch.ones(*shape[:-1], 7, dtype=dtype)) for f in both(7, 96, dtype)
    ]
    assert_all_same(*results)
    for only in wanted:
        assert_all_same(*(torch.autograd.grad(f(x, bias).float().square().sum(), only) for f in both(7, 96, dtype)))


def test_second_order_gradients_are_those_of_linear() -> None:
    x, bias = (t.requires_grad_() for t in inputs())
    results = []
    for f in both():
        first = torch.autograd.grad(f(x, bias).square().sum(), (x, bias), create_graph=True)
        results.append((first, torch.autograd.grad(first[0].sum() + first[1].sum(), (x, bias))))
    assert any((g != 0).any() for g in results[0][1])
    assert_all_same(*results)


def test_no_graph_is_kept_without_need() -> None:
    x, bias = inputs()
    packed, _ = both()
    assert packed(x, bias).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert packed(x, bias).grad_fn is None


def test_a_weight_that_wants_a_gradient_is_not_packed() -> None:
    weight, scale = random_codes(7, 96)
    expected = mxfp8_ops.pack(weight, scale)
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"MXFP8 weight is frozen .*requires_grad_\(False\)"):
        mxfp8_ops.pack(weight, scale)
    with torch.no_grad():
        assert_same(mxfp8_ops.pack(weight, scale), expected)


TRANSFORMS: dict[str, Callable[[Callable, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, b: grad(lambda x, b: f(x, b).square().sum(), argnums=(0, 1))(x, b),
    "jvp": lambda f, x, b: jvp(f, (x, b), (x.flip(0), b.flip(0))),
    "jacfwd": lambda f, x, b: jacfwd(f, argnums=(0, 1))(x, b),
    "vmap over rows": lambda f, x, b: vmap(f, (0, None))(x, b),
    "vmap over an inner axis": lambda f, x, b: vmap(f, (1, None))(torch.stack([x, x.flip(0)], 1), b),
    "vmap over x and bias": lambda f, x, b: vmap(f)(x, torch.stack([b, b.flip(0), -b])),
    "vmap over bias": lambda f, x, b: vmap(f, (None, 0))(x, torch.stack([b, b.flip(0), -b])),
    "vmap of vmap": lambda f, x, b: vmap(vmap(f, (0, None)), (0, None))(torch.stack([x, -x]), b),
    "vmap of grad": lambda f, x, b: vmap(grad(lambda x, b: f(x, b).square().sum()), (0, None))(x, b),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformed_linear_packed_is_the_transformed_linear(transform: Callable) -> None:
    packed, canonical = both()
    assert_all_same(transform(packed, *inputs()), transform(canonical, *inputs()))


@pytest.mark.parametrize("name", ["grad", "vmap over rows", "vmap over x and bias"])
def test_transforms_compile(name: str) -> None:
    packed, canonical = both()
    compiled = torch.compile(lambda x, b: TRANSFORMS[name](packed, x, b), fullgraph=True, backend="aot_eager")
    assert_all_same(compiled(*inputs()), TRANSFORMS[name](canonical, *inputs()))


def test_vmap_over_weights_is_one_linear_for_each() -> None:
    x, bias = inputs()
    pairs = [exact_linear_inputs(seed, 7, 96, torch.float32)[1:3] for seed in (1, 2)]
    packed = torch.stack([mxfp8_ops.pack(*pair) for pair in pairs])
    expected = torch.stack([mxfp8_ops.linear(x, *pair, bias) for pair in pairs])
    assert_same(vmap(lambda p: mxfp8_ops.linear_packed(x, p, 7, bias))(packed), expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_autocast_casts_x_and_bias_as_that_of_linear(requires_grad: bool, dtype: torch.dtype, low: torch.dtype) -> None:
    x, bias = (t.requires_grad_(requires_grad) for t in inputs(dtype=dtype))
    with torch.autocast("cpu", low):
        results = [(f(x, bias), f(x, None)) for f in both(dtype=dtype)]
    assert {y.dtype for y in results[0]} == {low}
    assert_all_same(*results)
    if requires_grad:
        gradients = [torch.autograd.grad(with_bias.sum(), (x, bias)) for with_bias, _ in results]
        assert_all_same(*gradients)


# --- errors --------------------------------------------------------------------------------------------


def good_arguments(op: str) -> dict[str, Any]:
    weight, scale = random_codes(7, 64)
    packed = mxfp8_ops.pack(weight, scale)
    return {
        "pack": {"weight": weight, "scale": scale},
        "unpack": {"packed": packed, "n": 7, "k": 64},
        "linear_packed": {"x": torch.ones(3, 64), "packed": packed, "n": 7, "bias": torch.ones(7)},
    }[op]


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, device=device).to(dtype)


E4M3 = torch.float8_e4m3fn
OTHER_SHAPE = "of a weight [{}] must be [265, 32] or [266, 32], got [133, 32]: is it the result of mxfp8_ops.pack"
BAD: dict[str, list[tuple[type[Exception], str, dict[str, Any]]]] = {
    "pack": [
        (ValueError, "only the weight [N, K] of a linear can be packed, got [64]", {"weight": ones(64, dtype=E4M3)}),
        (ValueError, "a linear can be packed, got [2, 7, 64]", {"weight": ones(2, 7, 64, dtype=E4M3)}),
        (TypeError, "weight must be float8_e4m3fn, got torch.float32", {"weight": ones(7, 64)}),
        (TypeError, "scales must be E8M0 bytes (uint8 or float8_e8m0fnu), got torch.float32", {"scale": ones(7, 2)}),
        (ValueError, "block size 32, got K=48 in [7, 48]", {"weight": ones(7, 48, dtype=E4M3)}),
        (ValueError, "weight is empty: dimension 0 of [0, 64] has length 0", {"weight": ones(0, 64, dtype=E4M3)}),
        (ValueError, "scale must be [7, 2] for a weight of [7, 64]", {"scale": ones(8, 2, dtype=torch.uint8)}),
        (ValueError, "weight is on meta, scale on cpu", {"weight": ones(7, 64, dtype=E4M3, device="meta")}),
        (ValueError, "for x of bfloat16 or float16, got dtype=torch.float32: for x", {"dtype": torch.float32}),
    ],
    "unpack": [
        (TypeError, "must be int32, got torch.int64: see mxfp8_ops.pack", {"packed": ones(133, 32, dtype=torch.int64)}),
        (ValueError, "n must be positive, got 0", {"n": 0}),
        (ValueError, "K must be a positive multiple of the block size 32, got K=48", {"k": 48}),
        (ValueError, "K must be a positive multiple of the block size 32, got K=0", {"k": 0}),
        (ValueError, OTHER_SHAPE.format("129, 64"), {"n": 129}),
        (ValueError, OTHER_SHAPE.format("7, 160"), {"k": 160}),
        (ValueError, "must be [133, 32] or [134, 32], got [132, 32]", {"packed": ones(132, 32, dtype=torch.int32)}),
        (ValueError, "must be [133, 32] or [134, 32], got [4256]", {"packed": ones(4256, dtype=torch.int32)}),
    ],
    "linear_packed": [
        (
            TypeError,
            "x must be float32, bfloat16 or float16, got torch.float64",
            {"x": ones(3, 64, dtype=torch.double)},
        ),
        (ValueError, "x must be [..., K], got a scalar", {"x": ones()}),
        (ValueError, "block size 32, got K=48", {"x": ones(3, 48)}),
        (ValueError, OTHER_SHAPE.format("7, 160"), {"x": ones(3, 160)}),
        (ValueError, "n must be positive, got -1", {"n": -1}),
        (TypeError, "a packed weight must be int32, got torch.float8_e4m3fn", {"packed": ones(7, 64, dtype=E4M3)}),
        (ValueError, "x is on meta, the packed weight on cpu: move them", {"x": ones(3, 64, device="meta")}),
        (TypeError, "x's dtype torch.float32, got torch.bfloat16: cast it", {"bias": ones(7, dtype=torch.bfloat16)}),
        (ValueError, "bias must be [7], got [8]", {"bias": ones(8)}),
        (ValueError, "bias must be [7], got [1, 7]", {"bias": ones(1, 7)}),
        (ValueError, "bias is on meta, x on cpu: move them to one device", {"bias": ones(7, device="meta")}),
    ],
}
BAD_CALLS = {f"{op}: {bad[1]}": (op, *bad) for op, table in BAD.items() for bad in table}
BAD_LINEARS = {name: bad for name, bad in BAD_CALLS.items() if bad[0] == "linear_packed"}


def test_the_arguments_that_the_table_changes_are_good() -> None:
    for op in ("pack", "unpack", "linear_packed"):
        getattr(mxfp8_ops, op)(**good_arguments(op))


@pytest.mark.parametrize(("op", "error", "words", "changes"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_fails_with_the_same_words_on_tensors_and_fakes(
    op: str, error: type[Exception], words: str, changes: dict[str, Any]
) -> None:
    arguments = good_arguments(op) | changes
    with pytest.raises(error, match=re.escape(words)):
        getattr(mxfp8_ops, op)(**arguments)
    with FakeTensorMode() as mode, pytest.raises(error, match=re.escape(words)):
        getattr(mxfp8_ops, op)(**tree_map_only(Tensor, mode.from_tensor, arguments))


@pytest.mark.parametrize(("op", "error", "words", "changes"), BAD_LINEARS.values(), ids=BAD_LINEARS)
def test_a_bad_call_that_wants_gradients_fails_with_the_same_words(
    op: str, error: type[Exception], words: str, changes: dict[str, Any]
) -> None:
    arguments = good_arguments(op) | changes
    for name in ("x", "bias"):
        arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(error, match=re.escape(words)):
        mxfp8_ops.linear_packed(**arguments)


# --- fakes, graphs, compilation ------------------------------------------------------------------------

# test_schema cannot compare fp8 arguments and results (a bug of torch, all versions so far).
_FP8_UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("n", "k"), [(7, 96), (128, 128), (130, 160)])
def test_opcheck_pack_and_unpack(n: int, k: int) -> None:
    weight, scale = exact_linear_inputs(1, n, k, torch.float32)[1:3]  # no NaN, which opcheck finds unequal to itself
    torch.library.opcheck(OPS.pack.default, (weight, scale), test_utils=_FP8_UTILS)
    torch.library.opcheck(OPS.unpack.default, (mxfp8_ops.pack(weight, scale), n, k), test_utils=_FP8_UTILS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_linear_packed(requires_grad: bool, dtype: torch.dtype) -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, dtype)
    bias.requires_grad_(requires_grad)
    packed = mxfp8_ops.pack(weight, scale)
    utils = _FP8_UTILS if requires_grad else "ALL"  # with a gradient the canonical weight is seen inside
    for rows, offset in ((x, bias), (x, None), (x[:0], bias), (x.unsqueeze(1), bias)):
        args = (rows.clone().requires_grad_(requires_grad), packed, 7, offset)
        torch.library.opcheck(OPS.linear_packed.default, args, test_utils=utils)


def test_fakes_agree_with_the_kernels_in_every_layout() -> None:
    x, weight, scale, bias = exact_linear_inputs(3, 7, 96, torch.bfloat16)
    packed = mxfp8_ops.pack(weight, scale)
    calls = [(OPS.pack, w, s) for w, s in itertools.product(strided_weights(weight), strided(scale))]
    calls += [(OPS.unpack, p, 7, 96) for p in (packed, *strided(packed))]
    calls += [(OPS.linear_packed, rows, packed, 7, bias) for rows in leading_dimensions(x)]
    for op, *args in calls:
        with FakeTensorMode() as mode:
            fake = op(*tree_map_only(Tensor, mode.from_tensor, args))
        for actual, promised in zip(tree_leaves(op(*args)), tree_leaves(fake), strict=True):
            facts = [(t.shape, t.stride(), t.storage_offset(), t.dtype, t.device) for t in (actual, promised)]
            assert facts[0] == facts[1]
            assert actual.is_contiguous()


def test_meta_tensors_go_in_and_come_out() -> None:
    x, weight, scale, bias = (a.to("meta") for a in exact_linear_inputs(3, 7, 96, torch.bfloat16))
    packed = mxfp8_ops.pack(weight, scale)
    assert (packed.device.type, packed.shape, packed.dtype) == ("meta", (133, 32), torch.int32)
    results = (*mxfp8_ops.unpack(packed, 7, 96), mxfp8_ops.linear_packed(x, packed, 7, bias))
    expected = (weight, scale, torch.empty(3, 7, dtype=torch.bfloat16, device="meta"))
    assert [(t.device, t.shape, t.dtype) for t in results] == [(t.device, t.shape, t.dtype) for t in expected]


def test_inference_mode_gives_inference_tensors_of_the_same_bits() -> None:
    packed, canonical = both()
    with torch.inference_mode():
        y = packed(*inputs())
    assert y.is_inference()
    assert_same(y.clone(), canonical(*inputs()))


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        _, self.weight, self.scale, self.bias = exact_linear_inputs(4, 7, 96, dtype)
        self.packed = mxfp8_ops.pack(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return mxfp8_ops.linear_packed(x, self.packed, 7, self.bias)

    def canonical(self, x: Tensor) -> Tensor:
        return mxfp8_ops.linear(x, self.weight, self.scale, self.bias)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_linear_packed_is_linear(dtype: torch.dtype, backend: str) -> None:
    layer = Layer(dtype)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for m in (3, 17, 1, 0):
        x = exact_linear_inputs(m, 7, 96, dtype)[0]
        assert_same(compiled(x), layer.canonical(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_pass_through_the_compiler(backend: str) -> None:
    x, bias = (t.requires_grad_() for t in inputs())
    packed, canonical = both()
    compiled = torch.compile(packed, backend=backend, fullgraph=True)
    assert_all_same(*(torch.autograd.grad(f(x, bias).square().sum(), (x, bias)) for f in (compiled, canonical)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_pack_and_unpack_are_the_eager_ones(backend: str) -> None:
    def function(weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        packed = mxfp8_ops.pack(weight, scale)
        return packed, *mxfp8_ops.unpack(packed, *weight.shape)

    weight, scale = random_codes(130, 160)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    assert_all_same(compiled(weight, scale), (mxfp8_ops.pack(weight, scale), weight, scale))


def test_one_graph_serves_every_number_of_rows() -> None:
    counter = CompileCounter()
    compiled = torch.compile(Layer(), backend=counter, fullgraph=True, dynamic=True)
    for m in (5, 9, 17, 64):
        compiled(torch.ones(m, 96))
    assert counter.frame_count == 1


def test_export_keeps_one_linear_packed() -> None:
    program = torch.export.export(Layer(), (torch.ones(4, 96),), dynamic_shapes=({0: torch.export.Dim("m")},))
    for exported in (program, program.run_decompositions()):
        called = Counter(str(n.target) for n in exported.graph.nodes if n.op == "call_function")
        assert called == {"mxfp8.linear_packed.default": 1}
    x = exact_linear_inputs(9, 7, 96, torch.float32)[0]
    assert_same(program.module()(x), Layer().canonical(x))
