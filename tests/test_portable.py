"""Packages of AOTInductor without compiling one: the program, the options, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from models import Chain, layer, rows
from torch import Tensor, nn

import lowering
import mxfp8_ops
from lowering import compat, kernels, portable
from mxfp8_ops import Mxfp8Linear, gpu


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of packages that would have been compiled, and are empty files instead."""
    found: list[dict[str, Any]] = []

    def compile_and_package(program: Any, path: Path, options: dict[str, Any]) -> None:
        found.append(options)
        path.touch()

    monkeypatch.setattr(compat, "compile_and_package", compile_and_package)
    monkeypatch.setattr(compat, "packages_e4m3_on_cpu", lambda: True)
    return found


@pytest.mark.parametrize(
    ("variable", "argument", "folds"),
    [
        (None, None, False),
        ("off", None, False),
        ("on", None, True),
        ("on", False, False),
        ("off", True, True),
    ],
)
def test_flag_decides_what_is_folded_when_loaded_and_freezing_never(
    variable: str | None,
    argument: bool | None,
    folds: bool,
    compiled: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("MXFP8_DEQUANT_AT_LOAD", variable)
    lowering.aoti_package(Chain(), (rows(),), tmp_path / "m.pt2", dequant_at_load=argument)
    assert compiled[0]["aot_inductor.use_runtime_constant_folding"] is folds
    assert compiled[0]["freezing"] is False


def test_model_without_mxfp8_weights_has_nothing_to_fold(compiled: list[dict[str, Any]], tmp_path: Path) -> None:
    lowering.aoti_package(nn.Linear(4, 4), (torch.ones(1, 4),), tmp_path / "m.pt2", dequant_at_load=True)
    assert compiled[0]["aot_inductor.use_runtime_constant_folding"] is False


def test_passes_of_the_user_are_kept(compiled: list[dict[str, Any]], tmp_path: Path) -> None:
    def own(graph: Any) -> None: ...

    options = {compat.POST_GRAD: own}
    lowering.aoti_package(Chain(), (rows(),), tmp_path / "m.pt2", dequant_at_load=True, options=options)
    assert compat.passes_in(compiled[0][compat.POST_GRAD])[0] is own
    assert options == {compat.POST_GRAD: own}


def test_failed_compilation_leaves_the_old_package_and_nothing_else(
    tmp_path: Path, compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Any, path: Path, options: dict[str, Any]) -> None:
        path.write_text("half")
        raise RuntimeError("no space left")

    (tmp_path / "m.pt2").write_text("old")
    monkeypatch.setattr(compat, "compile_and_package", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        lowering.aoti_package(Chain(), (rows(),), tmp_path / "m.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "old"


class Shared(nn.Module):
    """Two layers on one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = layer(64, 64)
        self.second = Mxfp8Linear.from_quantized(self.first.weight, self.first.weight_scale)
        self.second.weight_scale = self.first.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def calls(program: torch.export.ExportedProgram, target: Any) -> int:
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(len(graph.find_nodes(op="call_function", target=target)) for graph in graphs)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "packages_e4m3_on_cpu", lambda: True)


@pytest.mark.usefixtures("anywhere")
def test_weight_of_two_layers_is_dequantized_once_if_that_is_when_loaded() -> None:
    assert calls(portable.program(Shared(), (rows(),), dequant_at_load=True), kernels.dequant_loop) == 1
    assert calls(portable.program(Shared(), (rows(),), dequant_at_load=False), kernels.dequant_loop) == 2


@pytest.mark.usefixtures("anywhere")
def test_packed_layers_are_canonical_in_the_package_and_stay_packed_in_the_model() -> None:
    model, packed = Shared(), Shared()
    mxfp8_ops.pack_(packed)
    held = dict(packed.named_parameters())
    expected, actual = portable.program(model, {"x": rows()}), portable.program(packed, {"x": rows()})
    assert str(actual.graph) == str(expected.graph)
    assert actual.state_dict.keys() == expected.state_dict.keys()
    for name, tensor in expected.state_dict.items():
        assert_same(actual.state_dict[name], tensor)
    assert calls(portable.program(packed, (rows(),), dequant_at_load=True), kernels.dequant_loop) == 1
    assert all(tensor is held[name] for name, tensor in packed.named_parameters())
    assert held.keys() == {"first.weight_packed", "first.bias"}


@pytest.mark.usefixtures("anywhere")
def test_model_is_not_changed() -> None:
    model = Chain().train()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    text = repr(model)
    portable.program(model, (rows(),))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert_same(tensor, before[name][1])
    assert repr(model) == text
    assert model.training


@pytest.mark.usefixtures("anywhere")
def test_compiled_model_is_packaged_like_the_model() -> None:
    model = Chain()
    expected, actual = (portable.program(each, (rows(),)) for each in (model, torch.compile(model)))
    assert str(actual.graph) == str(expected.graph)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.inner(x), lambda x: x.clone(), (x,))


@pytest.mark.usefixtures("anywhere")
def test_linears_of_sub_graphs_are_lowered() -> None:
    program = portable.program(Branch(), (rows(),))
    assert calls(program, kernels.dequant_loop) == 1
    assert calls(program, mxfp8_ops.ops.linear) == 0


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer()

    def forward(self, x: Tensor) -> Tensor:
        weight = mxfp8_ops.dequant(self.inner.weight, self.inner.weight_scale, x.dtype)
        return F.linear(x, weight, self.inner.bias)


@pytest.mark.usefixtures("anywhere")
def test_linear_written_by_hand_is_the_same_program() -> None:
    graphs = [portable.program(model, (rows(),)).graph for model in (ByHand(), nn.Sequential(layer()))]
    assert [[node.target for node in graph.nodes if node.op == "call_function"] for graph in graphs] == [
        [kernels.dequant_loop, torch.ops.aten.linear.default]
    ] * 2


# --- bad input ----------------------------------------------------------------------------------------------


class Quantizing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mxfp8_ops.quantize(x)[1]


class OwnPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = layer()
        self.register_buffer("packed", mxfp8_ops.pack(inner.weight, inner.weight_scale))

    def forward(self, x: Tensor) -> Tensor:
        return mxfp8_ops.linear_packed(x, self.packed, 48)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("model", "inputs", "keywords", "error", "words"),
    [
        (Chain(), rows(), {}, TypeError, "inputs must be a tuple, or a dict by name, .* got Tensor"),
        (torch.sin, (rows(),), {}, TypeError, "only a torch.nn.Module can be packaged"),
        (Chain(), (rows(),), {"dequant_at_load": "on"}, TypeError, "dequant_at_load must be True, False or None"),
        (Chain(), (rows(),), {"fused": True}, ValueError, "a model on a CUDA device, this one is on cpu"),
        (Chain(), (rows(),), {"fused": True, "dequant_at_load": True}, ValueError, "nothing to dequantize at load"),
        (nn.Linear(64, 4).bfloat16(), (rows(),), {"fused": True}, ValueError, "calls no MXFP8 linear"),
        (Quantizing(), (rows(),), {}, ValueError, "mxfp8.quantize.default, which would need mxfp8_ops"),
        (OwnPacked(), (rows(),), {}, ValueError, "linear_packed on a packed tensor of its own"),
    ],
)
def test_what_cannot_be_packaged_is_refused_in_words(
    model: Any, inputs: Any, keywords: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        lowering.aoti_package(model, inputs, tmp_path / "m.pt2", **keywords)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("m.so", r"must end in .pt2, got '.*m.so'"),
        ("pt2", "must end in .pt2"),
        ("missing/m.pt2", r"no folder '.*missing' to write m.pt2 to"),
        ("folder.pt2", "is a folder"),
    ],
)
def test_path_that_cannot_be_is_refused_before_anything_is_exported(path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match=words):
        lowering.aoti_package(None, None, tmp_path / path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["freezing", "aot_inductor.use_runtime_constant_folding"])
def test_options_that_follow_from_the_flag_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}' follows from dequant_at_load"):
        lowering.aoti_package(Chain(), (rows(),), tmp_path / "m.pt2", options={name: True})


def test_released_weight_is_refused(tmp_path: Path) -> None:
    model = layer()
    lowering.released.release(model.weight)
    with pytest.raises(ValueError, match="weight was released"):
        lowering.aoti_package(model, (rows(),), tmp_path / "m.pt2")


def test_torch_that_cannot_compile_float8_for_the_cpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "packages_e4m3_on_cpu", lambda: False)
    with pytest.raises(ValueError, match=f"torch {re.escape(torch.__version__)} cannot compile float8 for the CPU"):
        lowering.aoti_package(Chain(), (rows(),), tmp_path / "m.pt2")


def test_device_that_cannot_read_e4m3_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "packages_e4m3_on_cpu", lambda: True)
    monkeypatch.setattr(kernels, "converts_e4m3", lambda device: False)
    with pytest.raises(ValueError, match="code for cpu cannot read float8_e4m3fn: package with fused=True"):
        lowering.aoti_package(Chain(), (rows(),), tmp_path / "m.pt2")


def test_fused_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    with pytest.raises(ValueError, match="needs Triton, which cannot be imported"):
        portable._portable(torch.device("cuda"))
