"""Our passes in Inductor's slots, beside those of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import layer, rows
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import lowering
from lowering import compat, passes

SLOTS = ["post_grad_custom_post_pass", "pre_grad_custom_pass"]


class Theirs(CustomGraphPass):
    """A user's pass that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.runs += 1

    def uuid(self) -> str:
        return "theirs"


def compile_with(**options: Any) -> None:
    with torch.no_grad(), config.patch(force_disable_caches=True):
        torch.compile(layer(), fullgraph=True, **options)(rows())


@pytest.mark.parametrize("slot", SLOTS)
def test_pass_in_the_configuration_runs_before_ours_on_every_way(slot: str) -> None:
    ways = [lambda: {"backend": "mxfp8"}, lambda: {"options": lowering.options()}, lambda: {}]
    for way in ways:
        theirs = Theirs()
        torch._dynamo.reset()
        with config.patch({slot: theirs}):
            options = way()
            if not options:
                lowering.enable()
            compile_with(**options)
        assert theirs.runs == 1


@pytest.mark.parametrize("slot", SLOTS)
def test_pass_in_the_options_is_chained(slot: str) -> None:
    theirs = Theirs()
    compile_with(options=lowering.options(**{slot: theirs}))
    assert theirs.runs == 1
    compile_with(backend="mxfp8", options={slot: theirs})
    assert theirs.runs == 2


def test_ours_stands_last_and_once() -> None:
    theirs = Theirs()
    patches = {compat.POST_GRAD: theirs}
    for _ in range(3):
        patches = passes.install(patches, compat.POST_GRAD, passes.LowerPass(True))
    first, last = compat.passes_in(patches[compat.POST_GRAD])
    assert first is theirs
    assert last == passes.LowerPass(True)


def test_several_passes_of_others_keep_their_order() -> None:
    theirs = [Theirs(), Theirs()]
    patches = passes.install({compat.POST_GRAD: compat.as_slot(theirs)}, compat.POST_GRAD, passes.LowerPass())
    assert list(compat.passes_in(patches[compat.POST_GRAD])[:2]) == theirs


def test_chain_of_one_slot_runs_all_and_has_all_identities() -> None:
    theirs = [Theirs(), Theirs()]
    chain = compat._Chain([*theirs, passes.LowerPass(False)])
    chain(fx.Graph())
    assert [each.runs for each in theirs] == [1, 1]
    assert chain.uuid() == ("theirs", "theirs", passes.LowerPass(False).uuid())
    assert compat._Chain([lambda graph: None]).uuid() is None  # no identity: Inductor must not cache


def test_equal_options_share_one_compiled_graph() -> None:
    assert lowering.options(True) == lowering.options(True)
    assert lowering.options(True) != lowering.options(False)


def test_options_reject_a_bad_flag() -> None:
    with pytest.raises(TypeError, match="dequant_at_load must be True, False or None"):
        lowering.options(dequant_at_load="yes")


@pytest.mark.parametrize("name", ["merge_linears", "release_quantized"])
def test_options_reject_what_only_the_backend_has(name: str) -> None:
    """Inductor would list all of its own options."""
    with pytest.raises(TypeError, match=rf"has no {name}: .* use torch\.compile\(m, backend=\"mxfp8\""):
        lowering.options(**{name: True})


def test_import_leaves_the_configuration_alone() -> None:
    assert config.post_grad_custom_post_pass is None
    assert config.pre_grad_custom_pass is None
    lowering.enable()
    assert config.post_grad_custom_post_pass is None
