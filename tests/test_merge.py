"""Linears on the same x are one call on one tensor where nothing can tell, and stay as they are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from models import entries_of, folding, layer, rows
from torch import Tensor, nn

import lowering
import mxfp8_ops
from lowering import released, report
from mxfp8_ops import Mxfp8Linear

PACKED = {"pack_at_load": True, "merge_linears": True}
DEQUANTIZED = {"dequant_at_load": True, "merge_linears": True}
both_forms = pytest.mark.parametrize("options", [PACKED, DEQUANTIZED], ids=["packed", "dequantized"])


def plain(n: int, seed: int = 1) -> Mxfp8Linear:
    return layer(n, 64, seed=seed, bias=False)


class Block(nn.Module):
    """The linears of attention and of an MLP, on small integers: each result is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = plain(64), plain(32), plain(48)
        self.gate, self.up = plain(300, seed=2), plain(300, seed=3)

    def forward(self, x: Tensor) -> Tensor:
        heads = [each(x).unflatten(-1, (-1, 16)).transpose(0, 1) for each in (self.q, self.k, self.v)]
        hidden = (torch.cat(heads).sum(0) > 0).repeat(1, 4).to(x.dtype)
        return F.relu(self.gate(hidden)) * self.up(hidden)


class Pair(nn.Module):
    """Two linears on one x, of sizes that fit no block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = plain(300), plain(7)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.first(x) * 1, self.second(x) * 1]


class Region(Pair):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        first, second = super().forward(x)
        return (first[:, :64] > second[:, :1]).to(x.dtype)


def run(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=folding(**options), fullgraph=True)


def same(actual: Any, expected: Any) -> None:
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True):
        assert_same(one, other)


def linears(model: Callable[..., Any], x: Tensor, **options: Any) -> int:
    """How many linears the lowered graph calls. Its results are those of eager."""
    torch._dynamo.reset()
    with report.collect() as graphs:
        same(run(model, **options)(x), model(x))
    (graph,) = graphs
    return sum(line.target.split(".")[-1] in ("linear", "linear_packed") for line in graph.lines("after"))


@both_forms
def test_linears_on_one_x_become_one_call_with_equal_results(options: dict[str, bool]) -> None:
    assert linears(Block(), rows(), **options) == 2
    assert linears(Block(), rows(), **options | {"merge_linears": False}) == 5
    assert linears(Pair(), rows().half(), **options) == 1


@both_forms
def test_merged_linears_train_through_inductor(options: dict[str, bool]) -> None:
    model, x, again = Pair(), rows().requires_grad_(), rows().requires_grad_()
    actual, expected = torch.compile(model, backend="mxfp8", options=options, fullgraph=True)(x), model(again)
    same(actual, expected)
    for results in (actual, expected):
        sum(each.sum() for each in results).backward()
    # Eager rounds the gradient of each linear to bfloat16 before it adds them, one linear rounds their sum.
    torch.testing.assert_close(x.grad, again.grad, rtol=2**-7, atol=2**-7 * again.grad.abs().max().item())


@both_forms
def test_biases_of_merged_linears_have_their_own_gradients(options: dict[str, bool]) -> None:
    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((each * each).sum() for each in function(rows())), biases)

    biases = [BIASED.bias, ANOTHER.bias]
    compiled = torch.compile(biased, backend="mxfp8", options=options, fullgraph=True)
    same(gradients(compiled), gradients(biased))


def test_nothing_is_merged_on_the_cpu_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linears(Pair(), rows(), pack_at_load=True) == 2
    assert linears(Pair(), rows(), merge_linears=True) == 2  # nor what is neither packed nor dequantized
    monkeypatch.setenv("MXFP8_MERGE_LINEARS", "on")
    assert linears(Pair(), rows(), pack_at_load=True) == 1
    assert linears(Pair(), rows(), pack_at_load=True, merge_linears=False) == 2
    monkeypatch.setenv("MXFP8_MERGE_LINEARS", "maybe")
    with pytest.raises(Exception, match=r"MXFP8_MERGE_LINEARS must be .*'maybe'"):
        linears(Pair(), rows(), pack_at_load=True)


def test_variable_flipped_between_calls_takes_effect_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, seen = run(Pair(), pack_at_load=True), []
    for word in ("off", "on", "0"):
        monkeypatch.setenv("MXFP8_MERGE_LINEARS", word)
        with report.collect() as graphs:
            compiled(rows())
        seen.append([graph.after.count(".split(") for graph in graphs])
    assert seen == [[0], [1], [0]]


@pytest.mark.parametrize("value", ["on", 1, torch.tensor(True)])
def test_a_value_that_is_no_bool_is_a_type_error(value: Any) -> None:
    for use in (lowering.Options, lowering.enable):
        with pytest.raises(TypeError, match="merge_linears must be True, False or None, got"):
            use(merge_linears=value)


Q, K, BIASED, ANOTHER = plain(64), plain(32), layer(32, 64), layer(48, 64)

_operators = torch.library.Library("merge_tests", "DEF")
for _name, _tags in (("rows", ()), ("any_strides", (torch.Tag.flexible_layout,))):
    _operators.define(f"{_name}(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, *_tags))
    _operators.impl(_name, lambda x: x * 2, "CompositeExplicitAutograd")
needs_rows_packet, takes_any = torch.ops.merge_tests.rows, torch.ops.merge_tests.any_strides
needs_rows = needs_rows_packet.default


def dense(of: Mxfp8Linear) -> Tensor:
    return mxfp8_ops.dequant(of.weight, of.weight_scale)


def biased(x: Tensor) -> list[Tensor]:
    return [BIASED(x) * 1, ANOTHER(x) * 1]


def bias_written_between(x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        first = BIASED(x) * 1
        ANOTHER.bias.add_(0)
        return [first, ANOTHER(x) * 1]


def written(x: Tensor) -> Tensor:
    result = Q(x)
    result.add_(1)
    return result * 2


def x_written_between(x: Tensor) -> list[Tensor]:
    x = x.clone()
    first = Q(x) * 1
    x.zero_()
    return [first, K(x) * 1]


def x_activated_between(x: Tensor) -> list[Tensor]:
    x = x - 1
    first = Q(x) * 1
    F.relu(x, inplace=True)
    return [first, K(x) * 1]


def under_no_grad(x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        first = Q(x) * 1
    return [first, K(x) * 1]


def under_autocast(x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.float16):
        first = Q(x) * 1
    return [first, K(x) * 1]


def computed(x: Tensor) -> list[Tensor]:
    return [Q(x) * 1, mxfp8_ops.linear(x, K.weight.view(torch.uint8).clone().view(K.weight.dtype), K.weight_scale) * 1]


UNMERGED: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "one has a bias": lambda x: [Q(x) * 1, BIASED(x) * 1],
    "a bias is computed in the graph": lambda x: [BIASED(x) * 1, F.linear(x, dense(K), BIASED.bias + 1) * 1],
    "a bias is written to between them": bias_written_between,
    "a result is given to an operator that may need its strides": lambda x: [needs_rows(Q(x)), K(x) * 1],
    "a view of a result is": lambda x: [needs_rows_packet(Q(x)[:2]), K(x) * 1],
    "x differs": lambda x: [Q(x) * 1, K(x + 1) * 1],
    "a result is returned": lambda x: [Q(x), K(x) * 1],
    "a view of a result is returned": lambda x: [Q(x).view(-1), K(x) * 1],
    "a result is written to": lambda x: [written(x), K(x) * 1],
    "a result is written to by its activation": lambda x: [F.relu(Q(x), inplace=True) * 1, K(x) * 1],
    "x is written to between them": x_written_between,
    "x is written to by an activation between them": x_activated_between,
    "one is under no_grad": under_no_grad,
    "one is under autocast to another dtype": under_autocast,
    "a weight is computed in the graph": computed,
    "a weight is used twice": lambda x: [Q(x) * 1, Q(x) * 2],
    "a result is seen as one row": lambda x: [Q(x).view(-1) * 1, K(x) * 1],
    "some rows are": lambda x: [Q(x)[:2].view(-1) * 1, K(x) * 1],
    "a chunk is": lambda x: [Q(x).chunk(2)[0].view(-1) * 1, K(x) * 1],
    "the result of a function is": lambda x: [torch.squeeze(Q(x)).view(-1) * 1, K(x) * 1],
    "a result is seen as another tensor is": lambda x: [Q(x).view_as(x.new_empty(64 * len(x))) * 1, K(x) * 1],
    "a result is seen by strides": lambda x: [Q(x).as_strided((len(x), 64), (64, 1)) * 1, K(x) * 1],
}


@both_forms
@pytest.mark.parametrize("model", UNMERGED.values(), ids=UNMERGED.keys())
def test_linears_are_not_merged_where(model: Callable[..., Any], options: dict[str, bool]) -> None:
    assert linears(model, rows(), **options) == 2


MERGED: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "results are seen as heads": lambda x: [Q(x).view(len(x), 4, 16).mT * 1, K(x).unflatten(1, (2, 16)) * 1],
    "results are reshaped": lambda x: [Q(x).reshape(-1) * 1, torch.flatten(K(x)) * 1],
    "results are transposed": lambda x: [Q(x).mT.contiguous() * 1, K(x)[1:].chunk(2)[0] * 1],
    "a result is given to an operator that takes any strides": lambda x: [takes_any(Q(x)), K(x) * 1],
    "each has a bias": biased,
    "x has more dimensions": lambda x: [each(y) * 1 for y in [x.view(1, -1, 64)] for each in (Q, K)],
}


@both_forms
@pytest.mark.parametrize("model", MERGED.values(), ids=MERGED.keys())
def test_linears_are_merged_where(model: Callable[..., Any], options: dict[str, bool]) -> None:
    assert linears(model, rows(), **options) == 1


def test_dequant_uses_are_not_merged() -> None:
    def model(x: Tensor) -> list[Tensor]:
        return [x @ mxfp8_ops.dequant(each.weight, each.weight_scale).t() for each in (Q, K)]

    with report.collect() as graphs:
        same(run(model, **DEQUANTIZED)(rows()), model(rows()))
    assert [line.count("weight") for line in graphs[0].after.splitlines() if ".dequantized:" in line] == [1, 1]


@both_forms
@pytest.mark.parametrize("changed", ["first.weight", "first.weight_scale", "second.weight", "second.weight_scale"])
def test_a_change_of_any_part_is_seen_in_place(changed: str, options: dict[str, bool]) -> None:
    model = Pair()
    compiled = run(model, **options)
    before = compiled(rows())
    (entry,) = entries_of(model)
    address = entry.value.data_ptr()
    part = model.get_submodule(changed.split(".")[0])
    if changed.endswith("scale"):
        part.weight_scale.add_(1)
    else:
        part.weight.data = part.weight.data.flip(0)
    after = compiled(rows())
    same(after, model(rows()))
    assert not all(map(torch.equal, before, after))
    assert [each.value.data_ptr() for each in entries_of(model)] == [address]


@both_forms
def test_release_frees_every_part_and_refuses_other_ways_to_merge(options: dict[str, bool]) -> None:
    model, release = Pair(), options | {"release_quantized": True}
    expected = {m: model(rows(m)) for m in (2, 5)}
    with report.collect() as graphs:
        same(run(model, **release)(rows()), expected[5])
    assert all(map(released.is_released, (model.first.weight, model.second.weight)))
    for row in graphs[0].weights:
        assert row.bytes_after == row.bytes_packed + row.bytes_dequantized
    torch._dynamo.reset()
    same(run(model, **options)(rows(2)), expected[2])
    for other in (options | {"merge_linears": False}, DEQUANTIZED if options is PACKED else PACKED):
        with pytest.raises(Exception, match=r"was released \(release_quantized=True\) and cannot be .* again"):
            run(model, **other)(rows())
    with pytest.raises(Exception, match=r"was released \(release_quantized=True\), and this graph would read it"):
        run(model)(rows())
    same(run(model, **options)(rows(2)), expected[2])


@both_forms
def test_a_dynamic_batch_compiles_once_for_all_sizes(options: dict[str, bool]) -> None:
    model = Block()
    with report.collect() as graphs:
        compiled = torch.compile(model, backend=folding(**options), fullgraph=True, dynamic=True)
        for m in (2, 3, 64, 300, 17):
            same(compiled(rows(m)), model(rows(m)))
    assert [graph.after.count(".split(") for graph in graphs] == [2]


@both_forms
def test_report_names_the_partners_and_shares_out_the_bytes(options: dict[str, bool]) -> None:
    model = Block()
    with report.collect() as graphs:
        run(model, **options)(rows())
    found = {row.name: row for row in graphs[0].weights}
    for names in (["q", "k", "v"], ["gate", "up"]):
        each = [found[f"{name}.weight"] for name in names]
        for row in each:
            others = [f"{name}.weight" for name in names if f"{name}.weight" != row.name]
            assert row.reason.endswith(f", one linear with {', '.join(others)}")
            assert row.bytes_after == row.bytes_before + row.bytes_packed + row.bytes_dequantized
        (entry,) = [entry for entry in entries_of(model) if len(entry.tensors) == 2 * len(names)]
        shares = sum(row.bytes_packed + row.bytes_dequantized for row in each)
        assert entry.value.nbytes - len(each) < shares <= entry.value.nbytes
    assert {row.action for row in found.values()} == {"folded" if options is DEQUANTIZED else "kept"}
    assert "input q.weight+k.weight+v.weight." in graphs[0].after


def test_graphs_share_the_merged_tensor() -> None:
    model = Pair()
    for scale in (1, 2):
        same(run(lambda x, scale=scale: model(x * scale), **PACKED)(rows()), model(rows() * scale))
    assert len(entries_of(model)) == 1


@both_forms
def test_linears_of_a_sub_graph_are_merged_there(options: dict[str, bool]) -> None:
    model = nn.Sequential(*[Region() for _ in range(3)])
    for i, each in enumerate(model):
        each.first.weight_scale.add_(i)
    with report.collect() as graphs:
        same(run(model, **options)(rows()), model(rows()))
    assert [len(entry.tensors) for entry in entries_of(model)] == [4, 4, 4]
    assert {row.name: row.reason.split(", one ")[-1] for row in graphs[0].weights} == {
        f"{i}.{name}.weight": f"linear with {i}.{other}.weight"
        for i in range(3)
        for name, other in (("first", "second"), ("second", "first"))
    }
