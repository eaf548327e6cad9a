"""Every wrong call fails, with the same words in eager mode, on fakes, on the meta device and at trace time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import mxfp8_ops


@dataclass(frozen=True)
class Bad:
    """One wrong call: keyword arguments that replace good ones, the error, and words of its message."""

    function: Callable[..., Any]
    error: type[Exception]
    words: str
    changes: dict[str, Callable[[], Any]]

    def arguments(self) -> dict[str, Any]:
        good = {
            mxfp8_ops.linear: {"x": ones(3, 64), "weight": packed(7, 64), "scale": scales(7, 2), "bias": ones(7)},
            mxfp8_ops.dequant: {"weight": packed(7, 64), "scale": scales(7, 2), "dtype": torch.bfloat16},
            mxfp8_ops.quantize: {"x": ones(3, 64), "rule": "rceil"},
        }[self.function]
        return good | {name: make() for name, make in self.changes.items()}


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def packed(*shape: int) -> Tensor:
    return ones(*shape).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.full(shape, 127, dtype=torch.uint8)


def bad_linear(error: type[Exception], words: str, **changes: Callable[[], Any]) -> Bad:
    return Bad(mxfp8_ops.linear, error, words, changes)


def bad_dequant(error: type[Exception], words: str, **changes: Callable[[], Any]) -> Bad:
    return Bad(mxfp8_ops.dequant, error, words, changes)


def bad_quantize(error: type[Exception], words: str, **changes: Callable[[], Any]) -> Bad:
    return Bad(mxfp8_ops.quantize, error, words, changes)


# What a linear and a dequant have in common: the pair (weight, scale).
BAD_PAIRS: dict[str, tuple[type[Exception], str, dict[str, Callable[[], Any]]]] = {
    "weight not packed": (
        TypeError,
        "weight must be float8_e4m3fn, got torch.float32",
        {"weight": lambda: ones(7, 64)},
    ),
    "weight as bytes": (
        TypeError,
        "float8_e4m3fn, got torch.uint8: see mxfp8_ops.quantize",
        {"weight": lambda: scales(7, 64)},
    ),
    "weight in e5m2": (TypeError, "got torch.float8_e5m2", {"weight": lambda: ones(7, 64).to(torch.float8_e5m2)}),
    "scale in float32": (
        TypeError,
        "must be E8M0 bytes (uint8 or float8_e8m0fnu), got torch.float32: these look like",
        {"scale": lambda: ones(7, 2)},
    ),
    "scale in bfloat16": (TypeError, "E8M0 bytes", {"scale": lambda: ones(7, 2, dtype=torch.bfloat16)}),
    "scale in int8": (
        TypeError,
        "E8M0 bytes (uint8 or float8_e8m0fnu), got torch.int8",
        {"scale": lambda: scales(7, 2).view(torch.int8)},
    ),
    "K not a multiple of 32": (
        ValueError,
        "weight (K) must be a positive multiple of the block size 32, got K=48 in [7, 48]",
        {"weight": lambda: packed(7, 48), "scale": lambda: scales(7, 1)},
    ),
    "K is 0": (
        ValueError,
        "positive multiple of the block size 32, got K=0 in [7, 0]",
        {"weight": lambda: packed(7, 0), "scale": lambda: scales(7, 0)},
    ),
    "N is 0": (
        ValueError,
        "weight is empty: dimension 0 of [0, 64] has length 0",
        {"weight": lambda: packed(0, 64), "scale": lambda: scales(0, 2)},
    ),
    "scale for other blocks": (
        ValueError,
        "scale must be [7, 2] for a weight of [7, 64] (one byte for 32 elements along K), got [7, 4]",
        {"scale": lambda: scales(7, 4)},
    ),
    "scale for other rows": (
        ValueError,
        "scale must be [7, 2] for a weight of [7, 64] (one byte for 32 elements along K), got [8, 2]",
        {"scale": lambda: scales(8, 2)},
    ),
    "scale transposed": (ValueError, "got [2, 7]", {"scale": lambda: scales(2, 7)}),
    "scale of rank 3": (ValueError, "got [7, 2, 1]", {"scale": lambda: scales(7, 2, 1)}),
    "scale that would broadcast": (ValueError, "got [1, 2]", {"scale": lambda: scales(1, 2)}),
    "scale swizzled": (
        ValueError,
        "a 1-D scale is swizzled or flattened, this package takes row-major scales",
        {"scale": lambda: scales(512)},
    ),
    "e8m0 scale of a wrong shape": (
        ValueError,
        "got [7, 3]",
        {"scale": lambda: scales(7, 3).view(torch.float8_e8m0fnu)},
    ),
    "scale on another device": (
        ValueError,
        "weight is on cpu, scale on meta: move them to one device",
        {"scale": lambda: scales(7, 2).to("meta")},
    ),
}

TABLE: dict[str, Bad] = {
    **{f"linear: {name}": Bad(mxfp8_ops.linear, *bad) for name, bad in BAD_PAIRS.items()},
    **{f"dequant: {name}": Bad(mxfp8_ops.dequant, *bad) for name, bad in BAD_PAIRS.items()},
    "linear: weight of rank 1": bad_linear(ValueError, "must be [N, K], got 1-D [64]", weight=lambda: packed(64)),
    "linear: weight of rank 3": bad_linear(
        ValueError, "must be [N, K], got 3-D [2, 7, 64]", weight=lambda: packed(2, 7, 64)
    ),
    "linear: weight is a scalar": bad_linear(ValueError, "must be [N, K], got 0-D []", weight=packed),
    "linear: x in float64": bad_linear(
        TypeError,
        "x must be float32, bfloat16 or float16, got torch.float64",
        x=lambda: ones(3, 64, dtype=torch.float64),
    ),
    "linear: x of integers": bad_linear(
        TypeError, "x must be float32, bfloat16 or float16, got torch.int64", x=lambda: ones(3, 64, dtype=torch.int64)
    ),
    "linear: x quantized": bad_linear(TypeError, "got torch.float8_e4m3fn", x=lambda: packed(3, 64)),
    "linear: x of another K": bad_linear(
        ValueError, "x must be [..., 64] for a weight of [7, 64], got [3, 32]", x=lambda: ones(3, 32)
    ),
    "linear: x is a scalar": bad_linear(ValueError, "x must be [..., 64] for a weight of [7, 64], got []", x=ones),
    "linear: x on another device": bad_linear(
        ValueError, "x is on meta, weight on cpu: move them to one device", x=lambda: ones(3, 64).to("meta")
    ),
    "linear: bias of another dtype": bad_linear(
        TypeError,
        "bias must have x's dtype torch.float32, got torch.bfloat16: cast it",
        bias=lambda: ones(7, dtype=torch.bfloat16),
    ),
    "linear: bias too long": bad_linear(
        ValueError, "bias must be [7] for a weight of [7, 64], got [8]", bias=lambda: ones(8)
    ),
    "linear: bias that would broadcast": bad_linear(
        ValueError, "bias must be [7] for a weight of [7, 64], got [1]", bias=lambda: ones(1)
    ),
    "linear: bias of rank 2": bad_linear(
        ValueError, "bias must be [7] for a weight of [7, 64], got [1, 7]", bias=lambda: ones(1, 7)
    ),
    "linear: bias is a scalar": bad_linear(ValueError, "bias must be [7] for a weight of [7, 64], got []", bias=ones),
    "linear: bias on another device": bad_linear(
        ValueError, "bias is on meta, x on cpu: move them to one device", bias=lambda: ones(7).to("meta")
    ),
    "dequant: weight is a scalar": bad_dequant(
        ValueError, "weight must have at least one dimension, got a scalar", weight=packed, scale=scales
    ),
    "dequant: empty inside": bad_dequant(
        ValueError,
        "weight is empty: dimension 1 of [2, 0, 64] has length 0",
        weight=lambda: packed(2, 0, 64),
        scale=lambda: scales(2, 0, 2),
    ),
    "dequant: to float64": bad_dequant(
        TypeError, "dtype must be float32, bfloat16 or float16, got torch.float64", dtype=lambda: torch.float64
    ),
    "dequant: to integers": bad_dequant(
        TypeError, "dtype must be float32, bfloat16 or float16, got torch.int32", dtype=lambda: torch.int32
    ),
    "quantize: x in float64": bad_quantize(
        TypeError,
        "x must be float32, bfloat16 or float16, got torch.float64",
        x=lambda: ones(3, 64, dtype=torch.float64),
    ),
    "quantize: x of integers": bad_quantize(
        TypeError, "x must be float32, bfloat16 or float16, got torch.int32", x=lambda: ones(3, 64, dtype=torch.int32)
    ),
    "quantize: x already quantized": bad_quantize(TypeError, "got torch.float8_e4m3fn", x=lambda: packed(3, 64)),
    "quantize: K not a multiple of 32": bad_quantize(
        ValueError,
        "x (K) must be a positive multiple of the block size 32, got K=33 in [3, 33]: pad it",
        x=lambda: ones(3, 33),
    ),
    "quantize: K is 0": bad_quantize(
        ValueError, "positive multiple of the block size 32, got K=0 in [3, 0]", x=lambda: ones(3, 0)
    ),
    "quantize: no rows": bad_quantize(
        ValueError, "x is empty: dimension 0 of [0, 64] has length 0", x=lambda: ones(0, 64)
    ),
    "quantize: x is a scalar": bad_quantize(ValueError, "x must have at least one dimension, got a scalar", x=ones),
    "quantize: unknown rule": bad_quantize(
        ValueError, "unknown quantization rule 'ceil': use one of rceil, floor", rule=lambda: "ceil"
    ),
}

every_bad_call = pytest.mark.parametrize("bad", TABLE.values(), ids=TABLE)


def test_the_arguments_that_the_table_changes_are_good() -> None:
    for function in (mxfp8_ops.linear, mxfp8_ops.dequant, mxfp8_ops.quantize):
        function(**Bad(function, ValueError, "", {}).arguments())


@every_bad_call
def test_eager_call_fails_and_leaves_its_inputs_alone(bad: Bad) -> None:
    arguments = bad.arguments()
    with pytest.raises(bad.error, match=re.escape(bad.words)) as caught:
        bad.function(**arguments)
    assert type(caught.value) is bad.error
    for actual, untouched in zip(arguments.values(), bad.arguments().values(), strict=True):
        if isinstance(actual, Tensor):
            assert actual._version == untouched._version
            assert actual.requires_grad is False
            if actual.device.type == "cpu":
                assert_same(actual, untouched)


@every_bad_call
def test_fake_call_fails_with_the_same_words(bad: Bad) -> None:
    arguments = bad.arguments()
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
        with pytest.raises(bad.error, match=re.escape(bad.words)):
            bad.function(**fakes)


@pytest.mark.parametrize(
    "bad", [b for n, b in TABLE.items() if "device" not in n], ids=[n for n in TABLE if "device" not in n]
)
def test_meta_call_fails_with_the_same_words(bad: Bad) -> None:
    arguments = tree_map_only(Tensor, lambda t: t.to("meta"), bad.arguments())
    with pytest.raises(bad.error, match=re.escape(bad.words)):
        bad.function(**arguments)


@every_bad_call
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_call_fails_while_it_is_traced(bad: Bad, dynamic: bool) -> None:
    compiled = torch.compile(
        lambda arguments: bad.function(**arguments), backend="eager", fullgraph=True, dynamic=dynamic
    )
    sizes = r"(?<=[\[ =])\d+(?=[,\] ])"  # symbols, when they are dynamic
    words = ".*".join(map(re.escape, re.split(sizes, bad.words) if dynamic else [bad.words]))
    with pytest.raises(Exception, match=words) as caught:
        compiled(bad.arguments())
    assert type(caught.value).__module__.startswith("torch._dynamo")
