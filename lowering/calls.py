"""How code that Inductor has generated calls the operators that stay calls: their kernels, not through torch's
dispatcher, which takes longer than a small linear. What the dispatcher would ask a compiled graph knows already.

before: ``buf1 = torch.ops.mxfp8.linear.default(buf0, weight, scale, None)``
after:  ``extern_kernels.mxfp8_linear(buf0, weight, scale, out=buf1)`` on CPUs, with memory that Inductor has planned;
        ``buf1 = extern_kernels.mxfp8_linear_packed_cuda(buf0, packed, n, None)`` on GPUs
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V

from mxfp8_ops import ops, packed
from mxfp8_ops.gpu import replay

from .graph import value_of

_CALLED = "mxfp8_called"
"""In the metadata of nodes: only our post-grad pass marks them. Inductor's cache keys do not cover registered
lowerings, but they cover our pass.
"""


def mark(graph: fx.Graph) -> None:
    """Has Inductor call the kernels of linears directly."""
    for target in (ops.linear, packed.linear_packed):
        for node in graph.find_nodes(op="call_function", target=target):
            node.meta[_CALLED] = value_of(node).device.type


def _linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    kernels = ops._cpu()
    if kernels is None:
        out.copy_(ops.linear(x, weight, scale, bias))
    else:
        kernels.linear_into(x, weight, scale, bias, out)


def _linear_cuda(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = replay.again("linear", (x, weight, scale, bias))
    return ops.linear(x, weight, scale, bias) if out is None else out


def _linear_packed_cuda(x: Tensor, weight: Tensor, n: int, bias: Tensor | None) -> Tensor:
    out = replay.again("linear_packed", (x, weight, bias), n)
    return packed.linear_packed(x, weight, n, bias) if out is None else out


# Generated code finds them here, as it does torch's own.
for _function in (_linear, _linear_cuda, _linear_packed_cuda):
    setattr(extern_kernels, f"mxfp8{_function.__name__}", _function)


@register_lowering(ops.linear, type_promotion_kind=None)
def _lower_linear(x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    device = _device()
    if device != "cpu":
        return _called(ops.linear, device, x, weight, scale, bias)
    inputs = [ir.ExternKernel.realize_input(each) for each in (x, weight, scale, bias) if each is not None]
    size = [*x.get_size()[:-1], weight.get_size()[0]]
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size))
    name = "extern_kernels.mxfp8_linear"
    return ir.TensorBox.create(ir.ExternKernelOut(layout, inputs, python_kernel_name=name, op_overload=ops.linear))


@register_lowering(packed.linear_packed, type_promotion_kind=None)
def _lower_linear_packed(x: Any, weight: Any, n: int, bias: Any) -> Any:
    return _called(packed.linear_packed, _device(), x, weight, n, bias)


def _device() -> str:
    """On which the operator is to be called directly; "" if it is not, as where no Python runs."""
    return "" if V.graph.cpp_wrapper else V.graph.current_node.meta.get(_CALLED, "")


def _called(target: Any, device: str, *args: Any) -> Any:
    """A call of the operator, under the name of our function for a GPU."""
    before = len(V.graph.operations)
    result = fallback_handler(target, add_to_fallback_set=False)(*args)
    if device == "cuda":
        for each in V.graph.operations[before:]:
            if isinstance(each, ir.FallbackKernel):
                each.python_kernel_name = f"extern_kernels.mxfp8_{target._opname}_cuda"
    return result
