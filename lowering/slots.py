"""The inputs that a lowered graph takes besides Dynamo's: weights in another form, checked at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor, fx

from . import released, store
from .forms import Form
from .graph import StaticView, view_name
from .watch import Watch, identities


@dataclass(frozen=True)
class Pair:
    """A weight and its scale, in terms of a graph's inputs."""

    weight: StaticView
    scale: StaticView

    @property
    def leaves(self) -> tuple[fx.Node, fx.Node]:
        return self.weight.leaf, self.scale.leaf

    @property
    def is_constant(self) -> bool:
        """Whether both are attributes of the graph module, as under freezing, rather than inputs."""
        return self.weight.leaf.op == self.scale.leaf.op == "get_attr"


@dataclass(frozen=True)
class Request:
    """One tensor that a graph asks for: weights in a form, several as one whose rows are those of all."""

    pairs: tuple[Pair, ...]
    form: Form

    @property
    def leaves(self) -> tuple[fx.Node, ...]:
        """The inputs it is made of: weight, scale, weight, scale, ..."""
        return tuple(leaf for pair in self.pairs for leaf in pair.leaves)

    @property
    def views(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """What is taken of each of them."""
        return tuple(view for pair in self.pairs for view in (pair.weight, pair.scale))

    @property
    def text(self) -> str:
        """Names the views: requests with one text and one form make the same of the same tensors."""
        return "|".join(view.text for pair in self.pairs for view in (pair.weight, pair.scale))

    @property
    def key(self) -> tuple[Any, ...]:
        return self.leaves, self.text, self.form

    @property
    def label(self) -> str:
        """The name of the input, ``q.weight.packed`` or ``q.weight+k.weight.packed``."""
        return "+".join(view_name(pair.weight) for pair in self.pairs) + f".{self.form.word}"


class Slot:
    """One appended input.

    Args:
        indices: the positions of what it is made of among Dynamo's arguments.
        request: what to make.
    """

    def __init__(self, indices: tuple[int, ...], request: Request) -> None:
        self.indices, self.request = indices, request
        self.entry: store.Entry | None = None

    def sources(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """What it is made of in this call."""
        return tuple(args[i] for i in self.indices)

    def fetch(self, args: Sequence[Any]) -> store.Entry:
        """The value for the weights and scales of this call, made or refreshed where need be, and kept until another
        is asked for.
        """
        request = self.request
        self.entry = store.entry(self.sources(args), request.views, request.text, request.form)
        return self.entry


class _Known:
    """The entries for the weights and scales of a call, and how those were. A released weight cannot change."""

    def __init__(self, args: Sequence[Any], sources: tuple[Tensor, ...], slots: Sequence[Slot]) -> None:
        self.epoch = store.epoch()  # before anything is looked at
        self.entries = [slot.fetch(args) for slot in slots]
        watched = [i for i, tensor in enumerate(sources) if not released.is_released(tensor)]
        self.watched = None if len(watched) == len(sources) else picker(watched)
        self.watch = Watch(sources if self.watched is None else self.watched(sources))
        if not all(entry.is_current(slot.sources(args)) for entry, slot in zip(self.entries, slots, strict=True)):
            self.epoch = -1  # changed by somebody else meanwhile: look again at the next call

    def is_current(self, sources: tuple[Tensor, ...]) -> bool:
        if self.epoch != store.epoch():
            return False
        return self.watch.sees_no_change(sources if self.watched is None else self.watched(sources))


@dataclass
class Folded:
    """A graph some of whose weights are extra inputs.

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
        """The compiled graph with the signature that Dynamo expects. Identical layers share one graph, so weights and
        scales may be other tensors at every call.

        All are checked at once, mostly in C: per weight that takes less than the call of an operator does by far.
        """
        if not self.slots:
            return compiled
        slots, kept = self.slots, picker(self.kept_inputs)
        sources = picker(list(dict.fromkeys(i for slot in slots for i in slot.indices)))
        known: dict[Hashable, _Known] = {}

        def call(*args: Any) -> Any:
            nonlocal known
            tensors = sources(args)
            which = identities(tensors)
            found = known.get(which)
            if found is None or not found.is_current(tensors):
                found = _Known(args, tensors, slots)
                alive = {key: each for key, each in known.items() if all(e.value is not None for e in each.entries)}
                known = alive | {which: found}  # replaced, not changed: other threads may be reading it
            return compiled(*kept(args), *[entry.value for entry in found.entries])

        return call


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes what stands at some positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return (lambda args: (args[positions[0]],)) if positions else (lambda args: ())
