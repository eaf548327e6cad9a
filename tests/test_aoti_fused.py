"""Packages with the fused kernel: what is compiled for a CUDA device, without one."""

# ruff: noqa: E402 (without Triton there is nothing to import, and nothing to test)

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import Launch, compile_for, one_code_a_row, what_codes_mean
from helpers import assert_same, exact_linear_inputs
from test_gpu_targets import CHIPS, Chip
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import mxfp8_ops
from lowering import kernels
from lowering.portable import program
from mxfp8_ops import Mxfp8Linear, reference
from mxfp8_ops.gpu import dispatch, gemv, portable

N, K = 48, 96
WRAPPER = torch.ops.higher_order.triton_kernel_wrapper_functional


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["sm_90", "sm_80"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the device, which need not be there, converts e4m3."""
    major, minor = request.param
    monkeypatch.setattr(dispatch, "_capability", lambda device: (major, minor))
    target = GPUTarget("cuda", 10 * major + minor, 32)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: target))
    return (major, minor) >= (8, 9)


def exported(make: Callable[[], nn.Module], m: int, dynamic: bool = False) -> fx.Graph:
    """The program of a model without data, on a CUDA device."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model, x = make().requires_grad_(False), torch.empty(m, K, dtype=torch.bfloat16)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return program(model, (x,), fused=True, dynamic_shapes=shapes).graph


def one_linear() -> nn.Module:
    return Mxfp8Linear(K, N, dtype=torch.bfloat16)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = one_linear()

    def forward(self, x: Tensor) -> Tensor:
        weight = mxfp8_ops.dequant(self.inner.weight, self.inner.weight_scale, x.dtype)
        return torch.nn.functional.linear(x, weight, self.inner.bias)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("make", [one_linear, ByHand], ids=["linear", "by hand"])
def test_linear_becomes_the_operator_that_a_compiler_looks_into(make: Any, dynamic: bool, native: bool) -> None:
    graph = exported(make, 20, dynamic)
    (node,) = [node for node in graph.nodes if node.op == "call_function"]
    assert node.target is portable.linear
    assert [str(arg) for arg in node.args[1:3]] == [
        next(str(each) for each in graph.nodes if str(each).endswith(name)) for name in ("weight", "weight_scale")
    ]
    assert node.args[4] is native
    assert node.meta["val"].shape[-1] == N


def test_linear_of_no_rows_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    graph = exported(one_linear, 0)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [
        kernels.dequant_loop,
        torch.ops.aten.linear.default,
    ]


class Call(nn.Module):
    def forward(self, *args: Any) -> tuple[Tensor]:
        return (portable.linear(*args),)


def launches(shape: tuple[int, ...], native: bool, bias: bool = True, dynamic: bool = False) -> fx.Node:
    """The one launch that tracing finds in the operator, for x of a shape."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes: Any = shape
    if dynamic:
        x = torch.empty(shape, device="meta")
        torch._dynamo.mark_dynamic(x, 0)
        sizes = mode.from_tensor(x).shape
    with mode, torch.device("cuda"):
        x = torch.empty(sizes, dtype=torch.bfloat16)
        weight, scale = torch.empty(N, K, dtype=torch.float8_e4m3fn), torch.empty(N, K // 32, dtype=torch.uint8)
        offset = torch.empty(N, dtype=torch.bfloat16) if bias else None
        gm, _ = aot_export_module(Call(), [x, weight, scale, offset, native], trace_joint=False)
    (node,) = gm.graph.find_nodes(op="call_function", target=WRAPPER)
    return node


@pytest.mark.parametrize(
    ("shape", "tiles", "rows"),
    [
        ((9,), 2, 16),
        ((33,), 1, 64),
        ((65,), 2, 64),
        ((3, 20), 1, 64),
    ],
    ids=str,
)
def test_graph_launches_one_kernel_that_writes_only_the_result(
    shape: tuple[int, ...], tiles: int, rows: int, native: bool
) -> None:
    node = launches((*shape, K), native)
    arguments = node.kwargs["kwargs"]
    assert node.kwargs["grid"] == [(tiles, 1, 1)]
    assert node.kwargs["tensors_to_clone"] == ["out"]
    assert {name: arguments[name] for name in ("M", "N", "K", "BM", "HAS_BIAS", "NATIVE")} == {
        "M": torch.Size(shape).numel(), "N": N, "K": K, "BM": rows, "HAS_BIAS": True, "NATIVE": native,
    }  # fmt: skip
    assert arguments["weight"].meta["val"].dtype == (torch.float8_e4m3fn if native else torch.uint8)


def test_few_rows_take_the_kernel_for_few_rows(native: bool) -> None:
    node = launches((3, K), native, bias=False)
    outputs, elements, _ = gemv.configuration(K, 3)
    assert node.kwargs["grid"] == [(N // outputs, 1, 1)]
    assert node.kwargs["tensors_to_clone"] == ["out"]
    assert {name: node.kwargs["kwargs"][name] for name in ("rows", "M", "BN", "BK")} == {
        "rows": 3, "M": 4, "BN": outputs, "BK": elements,
    }  # fmt: skip


def test_dynamic_rows_have_one_configuration_and_a_grid_of_the_size(native: bool) -> None:
    node = launches((5, K), native, dynamic=True)
    assert node.kwargs["kwargs"]["BM"] == 64
    assert isinstance(node.kwargs["kwargs"]["M"], fx.Node)
    assert str(node.kwargs["grid"][0][0].meta["val"]).endswith("//64)")  # type: ignore[union-attr,index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_kernel_compiles_for_every_chip_and_finds_its_shared_memory(chip: Chip, rows: int, dtype: torch.dtype) -> None:
    sizes = portable.configuration(rows)
    warps = sizes.pop("num_warps")
    with torch.device("meta"):
        x, out = torch.empty(rows, 4096, dtype=dtype), torch.empty(rows, 4096, dtype=dtype)
        weight = torch.empty(4096, 4096, dtype=torch.float8_e4m3fn if chip.has_e4m3 else torch.uint8)
        arguments = x, weight, torch.empty(4096, 128, dtype=torch.uint8), x, out, rows, 4096, 4096
    launch = Launch(portable.mxfp8_linear_portable, (1,), arguments, (False, chip.has_e4m3, *sizes.values()), warps)
    assert compile_for(launch, chip.target).metadata.shared <= chip.shared


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 8, 9, 33, 100])
def test_operator_gives_the_bits_of_the_reference_on_the_device(m: int, dtype: torch.dtype) -> None:
    native = dispatch.converts_e4m3(torch.device("cuda", 0))
    for n, k in ((1, 32), (7, 96), (256, 1024)):
        x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
        actual = portable.linear(x.cuda(), weight.cuda(), scale.cuda(), bias.cuda(), native)
        assert_same(actual.cpu(), reference.linear(x, weight, scale, bias))
    weight, scale = one_code_a_row((0, 1, 3, 127, 254, 255), 256)
    actual = portable.linear(torch.ones(m, 256, dtype=dtype).cuda(), weight.cuda(), scale.cuda(), None, native)
    assert_same(actual.cpu(), what_codes_mean(weight, scale, dtype).expand(m, -1))
