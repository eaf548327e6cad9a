"""The switches of the README's bisect table: each turns off what it says, and the answer stays the same."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from models import Chain, folding, layer, rows
from torch import Tensor

import lowering
import mxfp8_ops
from lowering import passes, report, weights
from mxfp8_ops import environment, ops, settings
from mxfp8_ops.cpu import library as kernels

WAYS: list[Callable[..., Callable[..., Tensor]]] = [
    lambda model: torch.compile(model, backend="mxfp8", fullgraph=True),
    lambda model: torch.compile(model, options=lowering.options(), fullgraph=True),
    lambda model: torch.compile(model, fullgraph=True),
]


def by_hand(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x @ mxfp8_ops.dequant(weight, scale, x.dtype).T


def compiled_graphs(compiled: Callable[..., Tensor], *inputs: Tensor) -> list[report.GraphReport]:
    with report.collect() as graphs, torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled(*inputs)
    return graphs


# --- eager ---------------------------------------------------------------------------------------------------


def test_compile_disable_is_eager_and_compiles_nothing() -> None:
    program = """
import torch, lowering, mxfp8_ops
model, x = mxfp8_ops.Mxfp8Linear.from_float(torch.randn(32, 64)), torch.randn(3, 64)
with lowering.report.collect() as graphs:
    same = torch.equal(torch.compile(model, backend="mxfp8")(x), model(x))
print(same, len(graphs))
"""
    environment = dict(os.environ, TORCH_COMPILE_DISABLE="1")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "0"], done.stderr
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # where it is not set
        exec(program, {})
    assert printed.getvalue().split() == ["True", "1"]


# --- passes off ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_passes_off_leaves_the_graph_to_inductor(way: Callable[..., Callable[..., Tensor]], monkeypatch) -> None:
    monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", "on")
    lowering.enable()
    compiled, packed = way(layer()), layer()
    assert len(compiled_graphs(compiled, rows())) == 1
    monkeypatch.setenv("MXFP8_PASSES", "off")
    assert compiled_graphs(compiled, rows()) == []
    with torch.no_grad():
        assert_same(compiled(rows()), packed(rows()))


def test_passes_off_recognises_and_folds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP8_PASSES", "0")
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        compiled = folding(dequant_at_load=True)(gm, inputs)
        seen.append(gm.code)
        return compiled

    packed = layer()
    torch.compile(packed, backend=backend, fullgraph=True)(rows())
    assert "mxfp8.linear" in seen[0]


def test_passes_off_refuses_a_released_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dequant_at_load": True, "release_quantized": True}
    compiled = torch.compile(layer(), backend="mxfp8", options=options, fullgraph=True)
    compiled(rows())
    monkeypatch.setenv("MXFP8_PASSES", "off")
    with pytest.raises(Exception, match=r"was released .* \(MXFP8_PASSES is off\)"):
        compiled(rows())


# --- kernels off ---------------------------------------------------------------------------------------------


def test_kernels_off_calls_the_reference_instead_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = layer(64, 64)
    compiled = torch.compile(by_hand, backend="mxfp8", fullgraph=True)
    inputs = (rows(), packed.weight, packed.weight_scale)
    (graph,) = compiled_graphs(compiled, *inputs)
    assert "mxfp8.dequant_loop(" in graph.post_grad[0]
    monkeypatch.setenv("MXFP8_KERNELS", "off")
    (graph,) = compiled_graphs(compiled, *inputs)
    assert "mxfp8.dequant(" in graph.post_grad[0]
    assert graph.weights[0].kernel == "mxfp8.dequant (reference) + aten.mm"
    assert_same(compiled(*inputs), by_hand(*inputs))


def test_kernel_name_is_the_device_own_only_while_kernels_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    with torch.library._scoped_library("mxfp8", "FRAGMENT") as library:
        library.define("named(Tensor x) -> Tensor")
        library.impl("named", lambda x: x, "CompositeExplicitAutograd")
        assert ops.kernel_name("named", cpu) == "reference"
        library.impl("named", lambda x: x, "CPU")
        assert ops.kernel_name("named", cpu) == f"cpu, {kernels.level()}"
        assert ops.kernel_name("named", meta) == "reference"
        monkeypatch.setenv("MXFP8_KERNELS", "off")
        assert ops.kernel_name("named", cpu) == "reference"


@pytest.mark.parametrize(
    ("hip", "capability", "packed"),
    [
        (None, (9, 0), "cuda"),
        (None, (8, 0), "cuda, dequantized in every call"),
        (None, (8, 9), "cuda, dequantized in every call"),
        (None, (10, 0), "cuda, dequantized in every call"),
        ("7.0", (9, 0), "cuda, dequantized in every call"),  # gfx90a
    ],
)
def test_kernel_name_of_a_packed_linear_says_what_the_chip_does(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int], packed: str
) -> None:
    dispatch = pytest.importorskip("mxfp8_ops.gpu.dispatch")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_gluon", True)
    device = torch.device("cuda", 0)
    assert ops.kernel_name("linear_packed", device) == packed
    assert weights.kernel_text("mxfp8.linear_packed", "cuda:0") == f"mxfp8.linear_packed ({packed})"
    assert ops.kernel_name("linear", device) == ops.kernel_name("dequant", device) == "cuda"
    monkeypatch.setattr(dispatch, "_gluon", False)  # its kernels did not compile
    assert ops.kernel_name("linear_packed", device) == "cuda, dequantized in every call"
    monkeypatch.setenv("MXFP8_KERNELS", "off")
    assert ops.kernel_name("linear_packed", device) == "reference"


# --- both ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("MXFP8_PASSES", settings.passes), ("MXFP8_KERNELS", settings.kernels)])
def test_switches_are_on_unless_a_word_says_off(name: str, value: Callable[[], bool], monkeypatch) -> None:
    assert value() is True
    for word, meaning in (("on", True), ("1", True), ("off", False), ("FALSE", False)):
        monkeypatch.setenv(name, word)
        assert value() is meaning
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ValueError, match=f"^{name} must be 1/true/yes/on or 0/false/no/off, got 'maybe'$"):
        value()


@pytest.mark.parametrize("name", environment.VARIABLES)
def test_every_switch_is_part_of_the_cache_identity(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = passes.LowerPass().uuid()
    monkeypatch.setenv(name, "on" if "LOAD" in name else "off")
    assert passes.LowerPass().uuid() != before


@pytest.mark.parametrize("name", environment.VARIABLES)
def test_flipping_any_switch_compiles_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(Chain(), backend=counter, fullgraph=True)
    compiled(rows())
    monkeypatch.setenv(name, "off")
    compiled(rows())
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "switch",
    [
        {"TORCH_COMPILE_DISABLE": "1"},
        {"MXFP8_PASSES": "off"},
        {"MXFP8_DEQUANT_AT_LOAD": "off"},
        {"MXFP8_DEQUANT_AT_LOAD": "on"},
        {"MXFP8_KERNELS": "off"},
    ],
)
def test_readme_names_every_switch(switch: dict[str, str]) -> None:
    (name, word) = next(iter(switch.items()))
    guide = (Path(__file__).parent.parent / "README.md").read_text().partition("## When something looks wrong")[2]
    assert f"`{name}={word}`" in guide
