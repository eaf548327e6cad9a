"""How Inductor computes what is not folded.

``mxfp8::linear`` stays one call of the operator's kernel. ``mxfp8::dequant`` becomes one pointwise loop:
two bytes in, one value out, no float32 tensor in memory. On GPUs that have no conversion of e4m3 it stays a call, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import ops as inductor_ops
from torch.utils._sympy.functions import FloorDiv

from mxfp8_ops import gpu, ops
from mxfp8_ops.format import BLOCK_SIZE, SCALE_NAN

# An operator of our own for the loop. The lowering is registered for this one, which only our post-grad pass
# puts into graphs: Inductor's cache keys do not cover registered lowerings, but they cover our pass.
_library = torch.library.Library("mxfp8", "FRAGMENT")
_library.define("dequant_loop(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")


def _dequant(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return ops.dequant(weight, scale, dtype)


_library.impl("dequant_loop", _dequant, "CompositeExplicitAutograd")
torch.library.register_fake("mxfp8::dequant_loop", _dequant, lib=_library)
dequant_loop = torch.ops.mxfp8.dequant_loop.default


def lower_dequant(graph: fx.Graph) -> int:
    """before: ``mxfp8.dequant(weight, scale, dtype)``, after: ``mxfp8.dequant_loop(weight, scale, dtype)``,
    which Inductor generates code for; returns how many.
    """
    nodes = graph.find_nodes(op="call_function", target=ops.dequant)
    nodes = [node for node in nodes if converts_e4m3(node.meta["val"].device)]
    for node in nodes:
        node.target = dequant_loop
    return len(nodes)


def converts_e4m3(device: torch.device) -> bool:
    """Whether the code that Inductor generates for a device can read elements: on GPUs Triton must know their type,
    which versions of it do not on Ampere, and emulate on ROCm.
    """
    kernels = gpu.kernels() if device.type == "cuda" else None
    return kernels is None or kernels.converts_e4m3(device)


@register_lowering(dequant_loop, type_promotion_kind=None)
def _lower_dequant_loop(weight: Any, scale: Any, dtype: torch.dtype) -> ir.TensorBox:
    load_weight, load_scale = weight.make_loader(), scale.make_loader()

    def element(index: list[Any]) -> Any:
        *leading, k = index
        value = inductor_ops.to_dtype(load_weight(index), torch.float32)
        code = inductor_ops.to_dtype(load_scale([*leading, FloorDiv(k, BLOCK_SIZE)]), torch.int32)
        return inductor_ops.to_dtype(inductor_ops.mul(value, _power_of_two(code)), dtype)

    return ir.Pointwise.create(
        device=weight.get_device(), dtype=dtype, inner_fn=element, ranges=list(weight.get_size())
    )


def _power_of_two(code: Any) -> Any:
    """``2**(code - 127)`` from an int32 E8M0 code, by its float32 bits (see reference.scale_to_float32)."""

    def constant(value: int) -> Any:
        return inductor_ops.constant(value, torch.int32)

    bits = inductor_ops.bitwise_left_shift(code, constant(23))
    bits = inductor_ops.where(inductor_ops.eq(code, constant(0)), constant(0x00400000), bits)
    bits = inductor_ops.where(inductor_ops.eq(code, constant(SCALE_NAN)), constant(0x7FC00000), bits)
    return inductor_ops.to_dtype_bitcast(bits, torch.float32, torch.int32)
