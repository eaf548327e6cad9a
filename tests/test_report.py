"""The report says what happened to every weight."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from models import Chain, folding, layer, rows
from torch import Tensor, nn

from lowering import report, weights
from lowering.weights import WeightReport
from mxfp8_ops import ops


def reported(model: nn.Module, x: Tensor, **options: bool) -> list[WeightReport]:
    with report.collect() as graphs:
        torch.compile(model, backend=folding(**options), fullgraph=True)(x)
    return report.distinct(graphs)


def test_every_weight_has_name_shape_action_reason_and_bytes() -> None:
    model = Chain()
    size = {name: 64 * n + 2 * n for name, n in (("up", 64), ("down", 32))}
    kept = ("kept", "the flag is not on")
    kernel = f"mxfp8.linear ({ops.kernel_name('linear', torch.device('cpu'))})"
    assert reported(model, rows()) == [
        WeightReport("up.weight", (64, 64), *kept, size["up"], size["up"], kernel),
        WeightReport("down.weight", (32, 64), *kept, size["down"], size["down"], kernel),
    ]
    folded = ("folded", "dequantized to bfloat16")
    assert reported(model, rows(), dequant_at_load=True) == [
        WeightReport("up.weight", (64, 64), *folded, size["up"], size["up"] + 8192, "linear"),
        WeightReport("down.weight", (32, 64), *folded, size["down"], size["down"] + 4096, "linear"),
    ]


def test_second_dtype_of_a_weight_is_added_to_its_row() -> None:
    twice = layer(bias=False)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = twice

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.inner(x), self.inner(x.float())]

    (weight,) = reported(Both(), rows(), dequant_at_load=True)
    assert weight.reason == "dequantized to bfloat16, float32"
    assert weight.bytes_after == weight.bytes_before + twice.weight.numel() * (2 + 4)


def test_names_are_paths_in_the_model_whatever_holds_it() -> None:
    model = nn.ModuleDict({"stem": nn.Identity(), "blocks": nn.ModuleList([layer(64, 64), layer()])})

    def run(x: Tensor) -> Tensor:
        return model["blocks"][1](model["blocks"][0](x))

    assert [weight.name for weight in reported(run, rows())] == ["model.blocks.0.weight", "model.blocks.1.weight"]
    names = [weight.name for weight in reported(nn.Sequential(*model["blocks"]), rows())]
    assert names == ["0.weight", "1.weight"]


def test_captures_nest_and_see_other_threads() -> None:
    with report.collect() as outer:
        with report.collect() as inner:
            thread = threading.Thread(target=lambda: reported(layer(), rows()))
            thread.start()
            thread.join()
        reported(layer(48, 96), rows(5, 96))
    assert (len(inner), len(outer)) == (1, 2)
    assert report.recent()[-2:] == outer


def test_table_is_plain_text_with_totals() -> None:
    table = weights.format_table(
        [
            WeightReport("up.weight", (64, 32), "folded", "dequantized to bfloat16", 2112, 6208, "aten.mm"),
            WeightReport("down.weight", (7, 32), "kept", "the flag is not on", 231, 231, "mxfp8.linear (reference)"),
        ]
    )
    assert table.splitlines() == [
        "weight            shape  action  bytes before  bytes after  kernel                    reason",
        "----------------  -----  ------  ------------  -----------  ------------------------  -----------------------",
        "up.weight         64x32  folded         2,112        6,208  aten.mm                   dequantized to bfloat16",
        "down.weight       7x32   kept             231          231  mxfp8.linear (reference)  the flag is not on",
        "----------------  -----  ------  ------------  -----------  ------------------------  -----------------------",
        "total: 2 weights                        2,343        6,439",
    ]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What a process writes to standard error and to its trace that compiles a canonical and a packed layer."""
    program = """
import torch, mxfp8_ops
options = {"dequant_at_load": True}
model = mxfp8_ops.Mxfp8Linear.from_float(torch.eye(32))
torch.compile(model, backend="mxfp8", options=options)(torch.eye(32))
packed = mxfp8_ops.Mxfp8Linear.from_float(torch.eye(32)).pack_().half()
torch.compile(packed, backend="mxfp8", options=options)(torch.eye(32).half())
"""
    folder = tmp_path_factory.mktemp("trace")
    environment = dict(os.environ, TORCH_TRACE=str(folder), TORCH_LOGS="+lowering")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, "".join(path.read_text() for path in folder.iterdir())


def test_torch_logs_show_one_line_a_weight(logged: tuple[str, str]) -> None:
    assert "folded weight [32, 32]: 1056 -> 5152 bytes (dequantized to float32)" in logged[0]


def test_torch_logs_show_packed_weights_with_their_decoding(logged: tuple[str, str]) -> None:
    words = "packed, fast decoding for float16 (on GPUs; here unpacked in every call); not folded while packed"
    assert f"kept weight_packed [32, 32]: 17024 -> 17024 bytes ({words}: unpack_() first)" in logged[0]


def test_torch_trace_has_graphs_and_report_and_logs_have_weights(logged: tuple[str, str]) -> None:
    log, trace = logged
    for name in ("mxfp8_before", "mxfp8_after", "mxfp8_report"):
        assert f'"artifact": {{"name": "{name}", "encoding": "string"}}' in trace
    assert "mxfp8.linear(" in trace
    assert "weight.dequantized" in log
    assert "passes took" in log


def test_graph_text_numbers_nodes_and_names_inputs_after_parameters() -> None:
    with report.collect() as graphs:
        torch.compile(Chain(), backend=folding(), fullgraph=True)(rows())
    lines = graphs[0].after.splitlines()
    assert "linear: bf16[5, 64] = mxfp8.linear(x, up.weight, up.weight_scale, up.bias)" in lines
    assert "linear_1: bf16[5, 32] = mxfp8.linear(to, down.weight, down.weight_scale, down.bias)" in lines
