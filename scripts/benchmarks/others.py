"""Further ways to a linear on the CPU: compiled ones of this package, and torchao's."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mxfp8_ops

from .timing import Calls


def columns(weights: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> dict[str, Calls]:
    """``compiled`` by plain ``torch.compile`` and ``backend`` with that of this package, one graph for all weights; and
    torchao's float8 weights, where it is installed.
    """
    torch.compiler.reset()  # no limit of recompiles is met
    plain = torch.compile(_linear, dynamic=False)
    backend = torch.compile(_linear, dynamic=False, backend="mxfp8", options={"dequant_at_load": False})
    found: dict[str, Calls] = {
        "compiled": [partial(plain, x, *w) for w in weights],
        "backend": [partial(backend, x, *w) for w in weights],
    }
    layers = _of_torchao(weights, x.dtype)
    return found | ({"torchao": [partial(layer, x) for layer in layers]} if layers else {})


def version_of_torchao() -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return None


def _linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return mxfp8_ops.linear(x, weight, scale)


def _of_torchao(weights: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[nn.Module]:
    """Linears whose weight is kept in float8 with one scale a row; none without torchao."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, quantize_
    except ImportError:
        return []
    return [_quantized(pair, dtype, quantize_, Float8WeightOnlyConfig()) for pair in weights]


def _quantized(pair: tuple[Tensor, Tensor], dtype: torch.dtype, quantize_: Any, config: Any) -> nn.Module:
    dense = mxfp8_ops.dequant(*pair, dtype)
    layer = nn.Linear(dense.shape[1], dense.shape[0], bias=False, dtype=dtype, device="meta")
    layer.weight = nn.Parameter(dense, requires_grad=False)
    quantize_(layer, config)
    return layer
