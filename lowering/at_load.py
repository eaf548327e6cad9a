"""Constants that a package of AOTInductor computes itself: dequantized weights, and nothing else.

Left to itself AOTInductor would compute everything that depends on constants alone. For a plain linear that is a
transposed view of its weight, which it makes a copy: the model's other weights would be in memory twice.

before: ``w = dequant_loop(weight, scale, bfloat16); y = mm(x, permute(w, [1, 0])); z = mm(y, permute(dense, [1, 0]))``
after:  ``w = ...; y = mm(x, permute(keep(w), [1, 0])); z = mm(y, permute(keep(dense), [1, 0]))``

``keep`` is its argument to Inductor, but not a constant to the part of it that splits off what is computed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.lowering import register_lowering

from . import kernels
from .graph import value_of
from .passes import Mxfp8Pass

_library = torch.library.Library("mxfp8", "FRAGMENT")
# Whatever is tagged like this is never folded.
_library.define("keep(Tensor constant) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
torch.library.register_fake("mxfp8::keep", torch.empty_like, lib=_library)
_keep = torch.ops.mxfp8.keep.default


@register_lowering(_keep, type_promotion_kind=None)
def _lower_keep(constant: Any) -> Any:
    return constant


class FoldOnlyDequant(Mxfp8Pass):
    """Post-grad: hides constants and dequantized weights from whatever does not serve to dequantize."""

    def __call__(self, graph: fx.Graph) -> None:
        loops = graph.find_nodes(op="call_function", target=kernels.dequant_loop)
        serving = _with_ancestors(loops)
        for node in [*graph.find_nodes(op="get_attr"), *loops]:
            others = [user for user in node.users if user not in serving]
            if others and isinstance(value_of(node), Tensor):
                with graph.inserting_after(node):
                    kept = graph.call_function(_keep, (node,))
                kept.meta["val"] = value_of(node)
                for user in others:
                    user.replace_input_with(node, kept)


def _with_ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found = set(nodes)
    pending = list(nodes)
    for node in pending:
        pending += [each for each in node.all_input_nodes if each not in found]
        found.update(node.all_input_nodes)
    return found
