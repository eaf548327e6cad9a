"""Load-time transformations without freezing: weights in another form become static inputs of the graph.

before: ``y = mxfp8.linear(x, weight, scale, bias)``
after:  ``y = F.linear(x, weight_dequantized, bias)`` with the flag on, ``weight_dequantized`` being a new graph input;
        else, where the device has kernels for it, ``y = mxfp8.linear_packed(x, weight_packed, n, bias)``

before: ``w = mxfp8.dequant(weight, scale, dtype)``
after:  with the flag on the new graph input in place of ``w``

Nothing is baked into the compiled artifact, so caches stay valid, graphs that share a weight share its other
form, and a weight that changes is seen at the next call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import compat, merge, released, store
from .account import Account
from .forms import Form, Packed, Wanted
from .graph import arguments, is_dequant, is_linear, is_linear_packed, value_of, view_name
from .levels import Level, Site, Use, drop_folded_operands, erase_unused_views, levels_below
from .report import GraphReport
from .slots import Folded, Pair, Request, Slot
from .weights import WeightReport
from .writes import storages

FLAG_IS_OFF = "the flag is not on"


class Hoist:
    """Plans and carries out the fold of one Dynamo graph, sub-graphs included.

    Args:
        gm: a copy of Dynamo's graph, which is changed.
        example_inputs: what Dynamo gave the backend: real parameters, one for each placeholder.
        wanted: what is to become of its weights.
        report: where what happened to each weight is written.

    Attributes:
        constants: the weights that stay and are attributes of the graph module (as under freezing): their rows
            in the report, and the tensors they are made of.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        wanted: Wanted,
        report: GraphReport,
    ) -> None:
        self.report = report
        self.example_inputs = list(example_inputs)
        self.wanted = wanted
        self.top = Level(gm)
        self._example = _examples(self.top, self.example_inputs)
        self.account = Account(report, self._example)
        self.levels = [self.top, *levels_below(self.top)]
        self.slots: list[Slot] = []
        self.dtypes: dict[tuple[Any, ...], list[torch.dtype]] = {}
        self.kept: list[tuple[Use, Pair | None, str]] = []
        self.constants: list[tuple[WeightReport, Tensor, Tensor]] = []

    def run(self) -> Folded:
        """Changes the graph, makes the dequantized weights, one at a time, and reports.

        Raises:
            ValueError: the graph would read a weight that was released.
        """
        for level in self.levels:
            self.account.plain_linears(level.gm.graph)
        for level in reversed(self.levels):
            self._handle(level, list(Use.all_in(level.gm.graph)))
            erase_unused_views(level.gm.graph)
            drop_folded_operands(level)
        kept_inputs = self._drop_folded_inputs()
        values = self._make_values(kept_inputs)
        for use, origin, reason in self.kept:
            self._leave(use, origin, reason)
        self.account.written_out(self.top.gm.graph)
        for level in self.levels:
            level.gm.recompile()
        inputs = [self.example_inputs[i] for i in kept_inputs]
        return Folded(self.top.gm, inputs + values, kept_inputs, self.slots)

    def _handle(self, level: Level, uses: list[Use]) -> None:
        made: dict[fx.Node, tuple[Use, Pair, Form]] = {}
        for use in uses:
            pair = use.pair()
            form = self._form(level, use, pair)
            reason = self._why_kept(level, use, pair, form)
            if not reason:
                assert pair is not None
                assert form is not None
                made[use.node] = use, pair, form
                continue
            for origin in self._origins(level, pair):
                if origin:
                    released.refuse(self._example(origin.weight.leaf), view_name(origin.weight), reason)
                self.kept.append((use, origin, reason))
        merged = self._merged(made)
        for node, (use, pair, form) in made.items():
            group = merged.get(node, [node])
            if len(group) == 1:
                use.replace(self._supply(level, Request((pair,), form), use.dtype), form)
            elif node is group[0]:
                request = Request(tuple(made[each][1] for each in group), form)
                n = sum(value_of(each).shape[-1] for each in group)
                merge.replace(group, self._supply(level, request, use.dtype), *form.linear(n))

    def _merged(self, made: dict[fx.Node, tuple[Use, Pair, Form]]) -> dict[fx.Node, list[fx.Node]]:
        """The calls that become one, by each of them. A weight that is used twice on one x keeps a value to itself."""
        calls = {
            node: (arguments(node, "x")[0], Request((pair,), form).key)
            for node, (use, pair, form) in made.items()
            if is_linear(node) and self.wanted.merges(self._value(use.weight).device)
        }
        often = Counter(calls.values())
        nodes = [node for node, call in calls.items() if often[call] == 1]
        return {node: group for group in merge.groups(nodes) for node in group}

    # --- may it be folded? ------------------------------------------------------------------------------

    def _form(self, level: Level, use: Use, pair: Pair | None) -> Form | None:
        """What the weight of a use is to become. One that is packed already stays packed for the dtype that it was
        packed for first: that of any other is a little slower, but a second copy would be as large.
        """
        if self.wanted.nothing:
            return None
        form = self.wanted.form(use.node, self._value(use.weight).device, use.dtype)
        if isinstance(form, Packed):
            weights = [self._example(origin.weight.leaf) for origin in self._origins(level, pair) if origin]
            return next(filter(None, map(store.packed_form, weights)), form)
        return form

    def _why_kept(self, level: Level, use: Use, pair: Pair | None, form: Form | None) -> str:
        """Why the weight of a use stays as it is, "" if it can be made into that form."""
        if is_linear_packed(use.node) and (self.wanted.dequantize or self.wanted.nothing not in ("", FLAG_IS_OFF)):
            return "not folded while packed: unpack_() first"
        if form is None:
            return self.wanted.nothing or FLAG_IS_OFF
        if is_dequant(use.node) and storages(use.node) & (level.written | level.returned):
            return "the dequantized tensor leaves the graph or is written to"
        reason = self._why_not_supplied(level, pair)
        return f"{FLAG_IS_OFF}; not packed: {reason}" if reason and isinstance(form, Packed) else reason

    def _why_not_supplied(self, level: Level, pair: Pair | None) -> str:
        if level.fixed:
            return f"inside {level.fixed}, whose graphs are left as they are"
        if pair is None:
            return "the weight is computed in the graph"
        if level.written and any(storages(leaf) & level.written for leaf in pair.leaves):
            return "the graph writes to the weight or its scale"
        if level is self.top:
            return next(filter(None, map(self._why_not_static, pair.leaves)), "")
        reasons = (self._why_not_supplied(site.caller, site.lift(level, pair)) for site in level.sites)
        return next(filter(None, reasons), "")

    def _why_not_static(self, leaf: fx.Node) -> str:
        if leaf.op == "get_attr":
            return "a constant of the graph, which only freezing folds"
        if not compat.is_static_input(leaf):
            return "an argument of the call, neither parameter nor buffer"
        tensor = self._example(leaf)
        if type(tensor) not in (Tensor, torch.nn.Parameter, released.ReleasedParameter, released.ReleasedTensor):
            return f"a {type(tensor).__name__}, not a plain tensor with data"
        if tensor.is_inference():
            return "made in inference mode: without a version counter a change could not be seen"
        return "it requires a gradient" if tensor.requires_grad else ""

    # --- the fold ---------------------------------------------------------------------------------------

    def _supply(self, level: Level, request: Request, dtype: torch.dtype) -> fx.Node:
        """The node that holds a request's value in this graph, made when there is none. ``dtype``: of x."""
        if level is self.top:
            self.dtypes.setdefault(request.key, []).append(dtype)
        if request.key not in level.added:
            value = None
            if level is self.top:  # its value is known when it has been made
                self.slots.append(Slot(tuple(level.positions[leaf] for leaf in request.leaves), request))
            else:
                value = request.form.empty(self._rows_of_all(request))
            node = compat.add_static_input(level.last_input(), len(level.added), request.label, value)
            level.added[request.key] = node
            for site, outer in self._outer(level, request):
                site.node.args = (*site.node.args, self._supply(site.caller, outer, dtype))
        elif level is not self.top:
            for site, outer in self._outer(level, request):
                self._supply(site.caller, outer, dtype)  # is there, but not yet for this dtype
        return level.added[request.key]

    @staticmethod
    def _outer(level: Level, request: Request) -> Iterator[tuple[Site, Request]]:
        """A request of a sub-graph in terms of each of its callers."""
        for site in level.sites:
            lifted = [site.lift(level, pair) for pair in request.pairs]
            assert all(lifted)  # _why_not_supplied looked at every site
            yield site, Request(tuple(filter(None, lifted)), request.form)

    @staticmethod
    def _rows_of_all(request: Request) -> Tensor:
        """A weight of the size of all, without data."""
        weights = [pair.weight(value_of(pair.weight.leaf)) for pair in request.pairs]
        if len(weights) == 1:
            return weights[0]
        return weights[0].new_empty((sum(len(weight) for weight in weights), weights[0].shape[1]))

    def _drop_folded_inputs(self) -> list[int]:
        """Erases inputs that nothing reads any more; returns the positions of those that stay."""
        folded = {i for slot in self.slots for i in slot.indices}
        dropped = {i for i in folded if not self.top.placeholders[i].users}
        for i in dropped:
            self.top.gm.graph.erase_node(self.top.placeholders[i])
        return [i for i in range(len(self.example_inputs)) if i not in dropped]

    def _make_values(self, kept_inputs: list[int]) -> list[Tensor]:
        """Makes slot by slot; quantized weights and their scales are released before the next value is made."""
        values, appended = [], list(self.top.added.values())
        last_use = {i: position for position, slot in enumerate(self.slots) for i in slot.indices}
        for position, slot in enumerate(self.slots):
            sources = slot.sources(self.example_inputs)
            sizes = [released.nbytes(source) for source in sources]
            with self.report.timed("dequantize"):
                entry = slot.fetch(self.example_inputs)
                assert entry.value is not None
                values.append(entry.value)
                appended[position].meta["example_value"] = compat.static_fake(entry.value)
            for pair in zip(slot.indices[::2], slot.indices[1::2], strict=True) if self.wanted.release else ():
                self._release(pair, [i in kept_inputs or last_use[i] > position for i in pair])
            held = [released.nbytes(source) for source in sources]
            self.account.made(slot.request, entry.value, self.dtypes[slot.request.key], sizes, held)
        return values

    def _release(self, pair: Sequence[int], needed: Sequence[bool]) -> None:
        """Frees a weight that nothing needs any more, and its scale."""
        for i, still_needed in zip(pair, needed, strict=True):
            source = self.example_inputs[i]
            if still_needed:
                return
            if not released.is_released(source):
                store.release(source)

    # --- what is not folded -----------------------------------------------------------------------------

    def _leave(self, use: Use, origin: Pair | None, reason: str) -> None:
        row = self.account.left(use.node, origin, self._value(use.weight), self._value(use.scale), reason)
        if origin and origin.is_constant:
            self.constants.append((row, self._example(origin.weight.leaf), self._example(origin.scale.leaf)))

    def _origins(self, level: Level, pair: Pair | None) -> list[Pair | None]:
        """A weight and scale in terms of the top graph's inputs, once for every way the sub-graph is reached."""
        if pair is None or level is self.top:
            return [pair]
        return [each for site in level.sites for each in self._origins(site.caller, site.lift(level, pair))]

    def _value(self, node: fx.Node) -> Tensor:
        value = value_of(node)  # torch 2.11 may have lost it, see compat.is_dynamo_graph
        return value if value is not None else getattr(self.top.gm, str(node.target))


def _examples(top: Level, inputs: Sequence[Any]) -> Callable[[fx.Node], Any]:
    """The tensors behind the top graph's inputs and constants. (No method: whoever keeps one keeps the weights.)"""

    def example(leaf: fx.Node) -> Any:
        if leaf.op == "get_attr":
            return getattr(top.gm, str(leaf.target), None)
        position = top.positions.get(leaf)
        return None if position is None else inputs[position]

    return example
