"""Who sees a call that could be made again from what was launched before: modes, tracers and autograd always do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import exact_linear_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import mxfp8_ops
from mxfp8_ops import derivatives
from mxfp8_ops.gpu import replay


class Asked(Exception):
    pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd takes CPUs for CUDA devices, where it would launch again what was launched before."""

    def again(*args: Any) -> None:
        raise Asked

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
    monkeypatch.setattr(derivatives, "_AUTOGRAD_AND_CUDA", keys.raw_repr())
    monkeypatch.setattr(replay, "again", again)


X, WEIGHT, SCALE, BIAS = exact_linear_inputs(3, 7, 96, torch.float32)
PACKED = mxfp8_ops.pack(WEIGHT, SCALE)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: mxfp8_ops.linear(x, WEIGHT, SCALE, BIAS),
    "linear_packed": lambda x: mxfp8_ops.linear_packed(x, PACKED, 7, BIAS),
    "dequant": lambda _: mxfp8_ops.dequant(WEIGHT, SCALE),
}
CALL = pytest.mark.parametrize("call", [CALLS["linear"], CALLS["linear_packed"]], ids=["linear", "linear_packed"])


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_plain_calls_need_no_second_trip_through_the_dispatcher(call: Callable[[Tensor], Tensor]) -> None:
    for context in (torch.no_grad, torch.enable_grad):
        with context(), pytest.raises(Asked):
            call(X)


class Seen(TorchDispatchMode):
    """Counts the operators of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "mxfp8"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_modes_see_the_operator(call: Callable[[Tensor], Tensor]) -> None:
    with Seen() as seen:
        call(X)
    assert seen.count == 1


@CALL
@pytest.mark.usefixtures("asked")
def test_fake_tensors_and_tracers_see_the_operator(call: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(X)).shape == (3, 7)
    for tracing in ("real", "fake", "symbolic"):
        graph = make_fx(call, tracing_mode=tracing, _allow_non_fake_inputs=True)(X)
        assert "mxfp8.linear" in graph.code
    graph = make_fx(call, pre_dispatch=True)(X)
    assert "mxfp8.linear" in graph.code


@CALL
@pytest.mark.usefixtures("asked")
def test_lazy_negation_is_carried_out_first(call: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(call(torch._neg_view(X)), reference(call, -X))


def reference(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():  # past Autograd
        return call(x)


@CALL
@pytest.mark.usefixtures("asked")
def test_functionalization_sees_the_operator(call: Callable[[Tensor], Tensor]) -> None:
    wrapped = torch._to_functional_tensor(X)
    torch._enable_functionalization(reapply_views=True)
    try:
        out = call(wrapped)
    finally:
        torch._disable_functionalization()
    assert torch._is_functional_tensor(out)
    assert torch.equal(torch._from_functional_tensor(out), reference(call, X))


@CALL
@pytest.mark.usefixtures("asked")
def test_autograd_sees_the_operator(call: Callable[[Tensor], Tensor]) -> None:
    x = X.clone().requires_grad_()
    assert call(x).grad_fn is not None
