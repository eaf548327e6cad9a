"""Whole models: layers that another module cannot stand in for are left, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mxfp8_ops import Mxfp8Linear, dequantize_at_load_, quantize_


class Doubled(Mxfp8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked_layer() -> Mxfp8Linear:
    layer = Mxfp8Linear(64, 64)
    layer.register_forward_hook(lambda module, args, result: result * 2)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubled(64, 64), "Doubled is a subclass of Mxfp8Linear"),
        (hooked_layer, "it has hooks, which a new module would lose"),
        (lambda: torch.compile(Mxfp8Linear(64, 64), backend="eager"), "it is compiled by itself"),
    ],
    ids=["subclass", "hooks", "compiled"],
)
def test_a_layer_that_a_plain_linear_cannot_replace_is_left(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make(), Mxfp8Linear(64, 64))
    first = model[0]
    left, dequantized = dequantize_at_load_(model, True)
    assert (left.action, dequantized.action) == ("left", "dequantized")
    assert left.reason.startswith(reason)
    assert left.bytes_before == left.bytes_after == 64 * 64 + 64 * 2
    assert model[0] is first
    assert type(getattr(first, "_orig_mod", first)) is not nn.Linear


def test_a_linear_that_is_compiled_by_itself_is_left() -> None:
    """Its compiled code goes on computing with the weight that it was compiled for."""
    compiled = torch.compile(nn.Linear(64, 64), backend="eager")
    model = nn.Sequential(compiled, nn.Linear(64, 64))
    assert [entry.action for entry in quantize_(model)] == ["left", "quantized"]
    assert type(compiled._orig_mod) is nn.Linear
    (entry,) = quantize_(compiled)
    assert entry.reason == "it is compiled by itself, and would still compute what it was: do this before torch.compile"
