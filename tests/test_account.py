"""The account of a graph: which weights are folded, kept or unmatched, why, and which linears are not MXFP8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import Chain, folding, layer, rows
from torch import Tensor, nn

import lowering
import mxfp8_ops
from lowering import introspection, report, weights
from lowering.report import GraphReport
from lowering.weights import Identity, Memory, WeightReport
from mxfp8_ops import ops


def account(model: Callable[..., object], *inputs: Tensor, **options: bool) -> GraphReport:
    torch._dynamo.reset()
    with report.collect() as graphs, torch.no_grad():
        torch.compile(model, backend=folding(**options), fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


class Weight(nn.Module):
    """One MXFP8 weight and a way to use it."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.use = use
        weight, scale = mxfp8_ops.quantize(torch.randn(shape or (48, 64)))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight, self.weight_scale)


def emulated(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """Dequantization as others write it out, on a plain linear."""
    scales = torch.exp2(s.view(torch.uint8).float() - 127).unsqueeze(-1)
    return F.linear(x, (w.float().unflatten(-1, (-1, 32)) * scales).flatten(-2).to(x.dtype))


IN_EVERY_CALL = "dequantized in every call"


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda x, w, s: x @ mxfp8_ops.dequant(w, s).T, f"{IN_EVERY_CALL} for matmul, which is not linear"),
        (lambda x, w, s: mxfp8_ops.dequant(w, s).sum(-1), f"{IN_EVERY_CALL} for sum, which is not linear"),
        (lambda x, w, s: mxfp8_ops.dequant(w, s), f"{IN_EVERY_CALL}: the result leaves the graph"),
        (
            lambda x, w, s: F.linear(x.float(), mxfp8_ops.dequant(w, s, torch.bfloat16).float()),
            "rounded to bfloat16 before the cast to float32, unlike linear, which rounds once: ask dequant for float32",
        ),
    ],
)
def test_dequant_that_no_linear_takes_is_unmatched_and_says_why(use: Callable[..., Tensor], why: str) -> None:
    (row,) = account(Weight(use), rows()).weights
    assert (row.name, row.action) == ("weight", "unmatched")
    assert row.reason == f"{why}; not folded: the flag is not on"
    assert row.bytes_after == row.bytes_before == 48 * 64 + 48 * 2


def test_stack_of_experts_is_unmatched_for_its_dimensions() -> None:
    model = Weight(lambda x, w, s: x @ mxfp8_ops.dequant(w, s).mT, 4, 24, 64)
    (row,) = account(model, rows()).weights
    assert row.reason.startswith(f"{IN_EVERY_CALL} for matmul: linear takes [N, K], not 3 dimensions; not folded")


def test_unmatched_dequant_is_folded_when_the_flag_is_on() -> None:
    model = Weight(lambda x, w, s: x @ mxfp8_ops.dequant(w, s).T)
    (row,) = account(model, rows(), dequant_at_load=True).weights
    assert (row.action, row.reason) == ("folded", "dequantized to bfloat16")


@pytest.mark.parametrize("flag", [True, False])
def test_written_out_emulation_is_unmatched_whatever_the_flag(flag: bool) -> None:
    graph = account(Weight(emulated), rows(), dequant_at_load=flag)
    (row,) = graph.weights
    assert (row.name, row.action, row.kernel) == ("weight", "unmatched", "linear")
    assert row.reason == "read by float, no operator of this package: use mxfp8_ops.linear(x, weight, scale)"
    assert graph.plain == []  # its weight is computed in the graph


def test_float8_without_block_scales_is_no_mxfp8_weight() -> None:
    class PerTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Buffer(torch.randn(48, 64).to(torch.float8_e4m3fn))
            self.scale = nn.Buffer(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, (self.weight.to(x.dtype) * self.scale).to(x.dtype))

    assert account(PerTensor(), rows()).weights == []


def test_weight_read_by_linear_and_by_dequant_is_unmatched() -> None:
    model = Weight(lambda x, w, s: mxfp8_ops.linear(x, w, s) + x @ mxfp8_ops.dequant(w, s).T)
    (row,) = account(model, rows()).weights
    assert row.action == "unmatched"
    kernel = ops.kernel_name("linear", torch.device("cpu"))
    assert row.kernel == f"mxfp8.linear ({kernel}) + mxfp8.dequant ({kernel}) + matmul"


def test_expert_of_a_stack_is_named_by_its_index_and_linked_to_its_own_nodes() -> None:
    def use(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return mxfp8_ops.linear(x, w[1], s[1]) + mxfp8_ops.linear(x, w[2], s[2])

    graph = account(Weight(use, 3, 24, 64), rows(), dequant_at_load=True)
    assert [row.name for row in graph.weights] == ["weight[1]", "weight[2]"]
    reads = {line.weights: line.text for line in graph.lines("after") if line.reads}
    assert reads == {
        ("weight[1]",): "linear: bf16[5, 24] = linear(x, weight[1].dequantized, None)",
        ("weight[2]",): "linear_1: bf16[5, 24] = linear(x, weight[2].dequantized, None)",
    }


def test_linears_that_are_not_mxfp8_are_listed_once_with_their_bytes() -> None:
    dense = nn.Linear(48, 24).bfloat16()
    (plain,) = account(nn.Sequential(layer(), dense, nn.Unflatten(-1, (1, 24))), rows()).plain
    assert (plain.name, plain.shape, plain.dtype, plain.nbytes) == ("1.weight", (24, 48), "bfloat16", 24 * 48 * 2)


def test_dequantized_linears_count_as_not_mxfp8() -> None:
    model = nn.Sequential(layer())
    mxfp8_ops.dequantize_at_load_(model)
    graph = account(model, rows())
    assert graph.weights == []
    assert [each.name for each in graph.plain] == ["0.weight"]


def test_every_line_of_a_weight_is_linked_up_to_the_one_that_reads_it() -> None:
    graph = account(Weight(emulated), rows())
    linked = [line.target for line in graph.lines("before") if line.weights == ("weight",) and line.target]
    assert linked[0] == ".view"
    assert linked[-1] == "linear"
    assert [line.reads for line in graph.lines("before") if line.weights].count(True) == 1


def test_peak_memory_counts_a_copy_before_its_packed_bytes_are_released() -> None:
    def row(before: int, after: int, dequantized: int) -> WeightReport:
        return WeightReport("w", (1, 1), "folded", "", before, after, bytes_dequantized=dequantized)

    assert weights.memory([row(10, 30, 20), row(10, 30, 20)]) == Memory(before=20, peak=60, after=60)
    assert weights.memory([row(10, 20, 20), row(10, 20, 20)]) == Memory(before=20, peak=50, after=40)
    assert weights.memory([WeightReport("w", (1, 1), "kept", "", 10, 10)]) == Memory(10, 10, 10)


def test_one_tensor_is_one_weight_whatever_two_graphs_call_it() -> None:
    shared = layer(64, 64)
    models = [nn.Sequential(shared), nn.ModuleDict({"inner": shared})]
    graphs = [account(models[0], rows()), account(lambda x: models[1]["inner"](x), rows())]
    names = [graph.weights[0].name for graph in graphs]
    assert names == ["0.weight", "inner.weight"] or names == ["0.weight", "models.1.inner.weight"]
    assert [row.name for row in report.distinct(graphs)] == names[1:]


@pytest.mark.parametrize("use", [mxfp8_ops.linear, emulated, lambda x, w, s: F.linear(x, w.bfloat16())])
def test_weights_of_dynamic_sizes_are_reported_with_those_of_now_and_without_guards(use: Callable[..., Tensor]) -> None:
    pairs = [mxfp8_ops.quantize(torch.randn(n, 64)) for n in (48, 32)]
    compiled = torch.compile(use, backend=folding(), dynamic=True)
    with report.collect() as graphs:
        assert [compiled(rows(), *pair).shape for pair in pairs] == [(5, 48), (5, 32)]
    (graph,) = graphs
    assert [(row.shape, row.bytes_before) for row in graph.weights] in ([((48, 64), 48 * 66)], [])


def test_plain_linear_on_a_weight_of_dynamic_size_compiles() -> None:
    compiled = torch.compile(F.linear, backend=folding(), dynamic=True)
    with report.collect() as graphs:
        assert [compiled(rows(), rows(n)).shape for n in (48, 32)] == [(5, 48), (5, 32)]
    assert [(plain.shape, plain.nbytes) for graph in graphs for plain in graph.plain] == [((48, 64), 48 * 64 * 2)]


# --- packed weights ------------------------------------------------------------------------------------------


FLAG = {True: "not folded while packed: unpack_() first", False: "the flag is not on"}
HERE = "(on GPUs; here unpacked in every call)"


def marked(scale: int = 127, code: int = 0x38) -> nn.Module:
    """A packed layer [48, 64] with one code and one scale in it that may need exact decoding."""
    weight = torch.full((48, 64), 0x38, dtype=torch.uint8)
    scales = torch.full((48, 2), 127, dtype=torch.uint8)
    weight[7, 40], scales[7, 1] = code, scale
    return mxfp8_ops.Mxfp8Linear.from_quantized(weight.view(torch.float8_e4m3fn), scales).pack_()


@pytest.mark.parametrize("flag", [True, False])
def test_packed_weights_are_kept_under_either_flag_with_shape_bytes_kernel_and_decoding(flag: bool) -> None:
    model = Chain()
    mxfp8_ops.pack_(model)
    reason = f"packed, fast decoding for bfloat16 {HERE}; {FLAG[flag]}"
    kernel, decoding = "mxfp8.linear_packed (reference)", {"bfloat16": "fast"}
    size = model.up.weight_packed.nbytes
    assert size == 133 * 32 * 4  # one block of 128 x 128
    assert account(model, rows(), dequant_at_load=flag).weights == [
        WeightReport("up.weight_packed", (64, 64), "kept", reason, size, size, kernel, decoding=decoding),
        WeightReport("down.weight_packed", (32, 64), "kept", reason, size, size, kernel, decoding=decoding),
    ]


@pytest.mark.parametrize(
    ("dtype", "scale", "code", "decoding"),
    [
        (torch.bfloat16, 134, 0x7E, "fast"),
        (torch.bfloat16, 0, 0x7E, "fast"),
        (torch.bfloat16, 135, 0x38, "exact"),
        (torch.bfloat16, 127, 0x7F, "exact"),
        (torch.float16, 95, 0x7E, "fast"),
        (torch.float16, 94, 0x38, "exact"),
        (torch.float16, 127, 0xFF, "exact"),
        (torch.float32, 127, 0x38, "dequantized"),
    ],
)
def test_decoding_is_the_one_of_the_codes_and_of_the_dtype_of_x(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: int, code: int, decoding: str
) -> None:
    monkeypatch.setattr(ops, "kernel_name", lambda name, device: "cuda")
    (row,) = account(marked(scale, code), rows(dtype=dtype)).weights
    name = str(dtype).removeprefix("torch.")
    words = {
        "fast": f"fast decoding for {name}",
        "exact": f"exact decoding for {name}, which some codes need",
        "dequantized": f"dequantized in every call for {name}",
    }
    assert row.decoding == {name: decoding}
    assert row.reason == f"packed, {words[decoding]}; the flag is not on"
    assert row.kernel == "mxfp8.linear_packed (cuda)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_decoding_is_reported_where_the_chip_dequantizes_packed_weights_in_every_call(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(ops, "kernel_name", lambda name, device: "cuda, dequantized in every call")
    (row,) = account(marked(94), rows(dtype=dtype)).weights
    name = str(dtype).removeprefix("torch.")
    assert row.decoding == {name: "dequantized"}
    assert row.reason == f"packed, dequantized in every call for {name}; the flag is not on"
    assert row.kernel == "mxfp8.linear_packed (cuda, dequantized in every call)"


def test_every_dtype_of_x_has_its_decoding() -> None:
    packed = marked(94)
    (row,) = account(lambda x: [packed(x), packed(x.half()), packed(x.half())], rows()).weights
    assert row.decoding == {"bfloat16": "fast", "float16": "exact"}
    words = "fast decoding for bfloat16, exact decoding for float16, which some codes need"
    assert row.reason == f"packed, {words} {HERE}; the flag is not on"


def test_autocast_decides_on_the_decoding() -> None:
    with torch.autocast("cpu", torch.float16):
        (row,) = account(marked(94), rows(dtype=torch.float32)).weights
    assert row.decoding == {"float16": "exact"}


def test_packed_weight_that_layers_share_is_counted_once() -> None:
    first = layer(64, 64)
    model = nn.Sequential(first, mxfp8_ops.Mxfp8Linear.from_quantized(first.weight, first.weight_scale))
    mxfp8_ops.pack_(model)
    graphs = [account(model, rows()), account(model[1], rows())]
    assert [len(graph.weights) for graph in graphs] == [1, 1]
    (row,) = report.distinct(graphs)
    size = first.weight_packed.nbytes
    assert weights.memory([row]) == Memory(size, size, size)


def test_packed_weights_in_a_stack_are_told_apart() -> None:
    weights = [mxfp8_ops.pack(*each.quantized()) for each in (layer(), marked(94).unpack_())]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Buffer(torch.stack(weights))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [mxfp8_ops.linear_packed(x.half(), self.packed[i], 48) for i in (0, 1)]

    rows_ = account(Stack(), rows()).weights
    assert [(row.name, row.decoding["float16"]) for row in rows_] == [("packed[0]", "fast"), ("packed[1]", "exact")]


def test_shape_of_a_packed_weight_is_known_under_dynamic_shapes_without_a_guard() -> None:
    packed = mxfp8_ops.pack(*layer(48, 96).quantized())
    compiled = torch.compile(lambda x: mxfp8_ops.linear_packed(x, packed, 48), backend=folding(), dynamic=True)
    with report.collect() as graphs:
        assert [compiled(rows(m, k)).shape for m, k in ((5, 96), (4, 96), (4, 64))] == [(5, 48), (4, 48), (4, 48)]
    (graph,) = graphs
    assert [row.shape for row in graph.weights] == [(48, 96)]


def test_packed_weight_of_a_sub_graph_has_the_name_it_has_outside() -> None:
    model = nn.Sequential(marked())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    (row,) = account(Checkpointed(), rows()).weights
    assert (row.name, row.shape, row.decoding) == ("inner.0.weight_packed", (48, 64), {"bfloat16": "fast"})


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without ``TORCH_TRACE``: pytest listens to torch's trace, for which every report is written out."""
    monkeypatch.setattr(introspection, "trace_artifact", lambda name, text: None)


@pytest.mark.usefixtures("no_trace")
def test_decoding_is_unknown_without_the_tensor() -> None:
    unknown = f"packed, decoding unknown for bfloat16 {HERE}; the flag is not on"
    with report.collect() as graphs:
        torch.compile(marked(), options=lowering.options(), fullgraph=True)(rows())  # passes see no tensors
        (row,) = graphs[0].weights
    assert (row.decoding, row.reason) == ({"bfloat16": "unknown"}, unknown)
    model = marked()
    torch.compile(model, backend=folding(), fullgraph=True)(rows())
    del model
    torch._dynamo.reset()
    (row,) = report.recent()[-1].weights
    assert (row.decoding, row.reason) == ({"bfloat16": "unknown"}, unknown)


@pytest.mark.usefixtures("no_trace")
def test_decoding_is_read_once_and_only_when_a_report_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read, value = [], Identity.value
    monkeypatch.setattr(Identity, "value", lambda self: read.append(self) or value(self))
    model = marked()
    compiled = torch.compile(model, backend=folding(), fullgraph=True)
    compiled(rows())
    compiled(rows())
    assert read == []
    for _ in range(2):
        (row,) = report.recent()[-1].weights
        assert (row.decoding, len(read)) == ({"bfloat16": "fast"}, 1)
