"""Small models whose answers have the same bits on every path, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers import exact_linear_inputs
from torch import Tensor, fx, nn

from lowering import Options, backend, store
from mxfp8_ops import Mxfp8Linear

Compiled = Callable[..., Any]


def layer(
    n: int = 48, k: int = 64, seed: int = 3, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Mxfp8Linear:
    """One packed layer with small integers for weights; ``seed`` makes layers of one shape differ."""
    _, weight, scale, offset = exact_linear_inputs(seed, n, k, dtype)
    return Mxfp8Linear.from_quantized(weight, scale, offset if bias else None)


def rows(m: int = 5, k: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Activations for ``layer(k=k)``: its result is exact, whatever the order of summation."""
    generator = torch.Generator().manual_seed(m)
    used = torch.rand(m, k, generator=generator).argsort(-1) < 4
    return torch.where(used, 1.0, 0.0).to(dtype)


class Chain(nn.Module):
    """Two layers with a step between them that brings every value back to 0 or 1."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up = layer(64, 64, seed=5, dtype=dtype)
        self.down = layer(32, 64, seed=6, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down((hidden > hidden.amax(-1, keepdim=True) / 2).to(x.dtype))


def folding(**options: Any) -> Compiled:
    """A Dynamo backend that runs our lowering and then the graph eagerly: everything but Inductor."""

    def inductor(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Compiled:
        return gm.forward

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return backend.lower(gm, inputs, Options(**options), {}, inductor)

    return compile_graph


def entries_of(model: nn.Module) -> list[store.Entry]:
    """What the store has made of a model's weights and is still in use."""
    tensors = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return [entry for key, entry in list(store._entries.items()) if tensors.intersection(key[0])]
