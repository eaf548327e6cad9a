"""The inputs that a folded graph takes besides Dynamo's: dequantized weights, checked at every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from . import store
from .graph import StaticView


@dataclass(frozen=True)
class Request:
    """One dequantized weight that a graph asks for."""

    weight: StaticView
    scale: StaticView
    dtype: torch.dtype

    @property
    def views(self) -> str:
        """Names the two views: requests with one text make the same value of the same tensors."""
        return f"{self.weight.text}|{self.scale.text}"

    @property
    def is_constant(self) -> bool:
        """Whether both are attributes of the graph module, as under freezing, rather than inputs."""
        return self.weight.leaf.op == self.scale.leaf.op == "get_attr"


class Slot:
    """One appended input.

    Args:
        indices: the positions of its weight and its scale among Dynamo's arguments.
        request: what to make of them.
    """

    def __init__(self, indices: tuple[int, int], request: Request) -> None:
        self.weight_index, self.scale_index = indices
        self.request = request
        self.entries: dict[tuple[int, int], store.Entry] = {}

    def current(self, args: Sequence[Any]) -> Tensor:
        """The dequantized value for the weight and scale of this call: identical layers share one graph,
        so they may be other tensors at every call.
        """
        weight, scale = args[self.weight_index], args[self.scale_index]
        entry = self.entries.get((id(weight), id(scale)))
        if entry is None or not entry.is_current(weight, scale):
            entry = self.fetch(weight, scale)
        return entry.value  # type: ignore[return-value]

    def fetch(self, weight: Tensor, scale: Tensor) -> store.Entry:
        """Makes or refreshes the value, and forgets those whose weights are gone."""
        request = self.request
        entry = store.entry(weight, scale, request.weight, request.scale, request.views, request.dtype)
        entries = {key: each for key, each in self.entries.items() if each.value is not None}
        entries[id(weight), id(scale)] = entry
        self.entries = entries  # replaced, not changed: other threads may be reading it
        return entry


@dataclass
class Folded:
    """A graph whose dequantized weights are extra inputs.

    Attributes:
        gm: the graph.
        inputs: example inputs of ``gm``.
        kept_inputs: which of Dynamo's inputs ``gm`` still takes.
        slots: the inputs appended to them.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    kept_inputs: list[int]
    slots: list[Slot]

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled graph with the signature that Dynamo expects."""
        if not self.slots:
            return compiled
        kept, slots = self.kept_inputs, self.slots

        def call(*args: Any) -> Any:
            return compiled(*[args[i] for i in kept], *[slot.current(args) for slot in slots])

        return call
