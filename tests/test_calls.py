"""Generated code calls a linear's kernel itself, wherever that gives the same answer as torch's dispatcher."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import assert_same
from models import layer, rows
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import mxfp8_ops
from lowering import calls
from mxfp8_ops.cpu import dispatch

DIRECT, DISPATCHED = "extern_kernels.mxfp8_linear(", "torch.ops.mxfp8.linear.default("


@pytest.fixture(autouse=True)
def generated_anew() -> Iterator[None]:
    """Code found in a cache is not shown."""
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        yield


def code_of(function: Callable[..., Tensor], *args: Tensor, **options: object) -> str:
    """What is generated for a function, whose result must be that of eager."""
    compiled = torch.compile(function, fullgraph=True, **({"backend": "mxfp8"} | options))
    result, (code,) = run_and_get_code(compiled, *args)
    assert_same(result, function(*args))
    return code


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row without a dimension": lambda x: x[0],
    "several dimensions": lambda x: x.view(2, 3, 64),
    "every other row": lambda x: x[::2],
    "a column of rows": lambda x: x.t().contiguous().t(),
    "no rows": lambda x: x[:0],
    "computed": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_a_linear_is_called_directly_and_is_eager_s(view: str, bias: bool, dtype: torch.dtype) -> None:
    model = layer(bias=bias, dtype=dtype)
    code = code_of(lambda x: model(VIEWS[view](x)), rows(6, dtype=dtype))
    assert code.count(DIRECT) == 1
    assert DISPATCHED not in code


def test_more_rows_than_go_through_in_one_pass_too() -> None:
    assert code_of(layer(), rows(70)).count(DIRECT) == 1


def test_weights_that_are_not_contiguous_too() -> None:
    model = layer(64, 64)
    weight, scale = model.weight[::2], model.weight_scale[::2]
    assert code_of(lambda x: mxfp8_ops.linear(x, weight, scale), rows()).count(DIRECT) == 1


def test_one_graph_is_for_every_number_of_rows() -> None:
    model = layer()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mxfp8", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (2, 5, 33, 70):
            assert_same(compiled(rows(m)), model(rows(m)))


def test_results_lie_in_memory_that_inductor_plans() -> None:
    model = layer(64, 64)

    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            x = model(x).sign().abs()
        return x

    assert re.search(r"buf\d+ = buf\d+.*; del buf\d+ +# reuse", code_of(chain, rows(64))) is not None


def test_a_kernel_that_is_asked_for_no_more_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer(), rows()
    out = torch.empty(5, 48, dtype=torch.bfloat16)
    monkeypatch.setenv("MXFP8_KERNELS", "off")
    monkeypatch.setattr(dispatch, "linear_into", None)
    calls._linear(x, model.weight, model.weight_scale, model.bias, out=out)
    assert_same(out, model(x))


def test_without_our_pass_inductor_calls_the_operator() -> None:
    code = code_of(layer(), rows(), backend="inductor")
    assert DISPATCHED in code
    assert DIRECT not in code


def test_without_kernels_inductor_calls_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_KERNELS", "off")
    code = code_of(layer(), rows())
    assert DISPATCHED in code
    assert DIRECT not in code


def test_what_a_gpu_is_called_with_goes_to_the_operator_where_nothing_is_replayed() -> None:
    model, x = layer(), rows()
    packed = mxfp8_ops.pack(model.weight, model.weight_scale)
    assert_same(calls._linear_cuda(x, model.weight, model.weight_scale, model.bias), model(x))
    assert_same(calls._linear_packed_cuda(x, packed, 48, model.bias), model(x))


def test_forward_and_backward_of_training_are_eager_s() -> None:
    model = layer()

    def gradients(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = rows().requires_grad_()
        y = function(x)
        y.square().sum().backward()
        return y.detach(), x.grad

    with torch.enable_grad():
        compiled = gradients(torch.compile(model, backend="mxfp8", fullgraph=True))
        eager = gradients(model)
    for one, other in zip(compiled, eager, strict=True):
        assert_same(one, other)


def test_where_no_python_runs_between_layers_the_answer_is_eager_s() -> None:
    model = layer()
    code_of(model, rows(), options={"cpp_wrapper": True})
