"""After any error in the middle of loading the model is as before, and so is the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_opens_as, edit_header, made, replace_tensors
from dialects import Content, random_content
from helpers import assert_same
from torch import Tensor, nn

from mxfp8_ops import reference
from mxfp8_ops.checkpoint import CheckpointError, load_into, open_checkpoint

LAYERS = {f"model.layers.{index}.{name}": (96, 128) for index in range(2) for name in ("q_proj", "k_proj")}
LAST = "model.layers.1.q_proj"
FILE = "model-00003-of-00003.safetensors"


def model_for(content: Content) -> nn.Module:
    """A module with the linears, the norm and the embedding of a content, of values of its own."""
    root = nn.Module()
    biased = {name for name, layer in content.layers.items() if layer.bias is not None}
    modules: dict[str, nn.Module] = {name: nn.Linear(128, 96, bias=name in biased) for name in content.layers}
    modules |= {"model.embed_tokens": nn.Embedding(48, 128), "model.norm": nn.RMSNorm(128)}
    modules |= {"lm_head": nn.Linear(128, 48, bias=False)}
    for name, module in modules.items():
        parent = root
        *parents, leaf = name.split(".")
        for each in parents:
            if each not in parent._modules:
                parent.add_module(each, nn.Module())
            parent = parent._modules[each] or root
        parent.add_module(leaf, module)
    return root.eval()


def state(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, Tensor]]:
    """Modules and parameters, which are compared as objects, and copies of the values."""
    parameters = dict(model.named_parameters())
    return dict(model.named_modules()), parameters, {name: each.detach().clone() for name, each in parameters.items()}


def assert_untouched(
    model: nn.Module, before: tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, Tensor]]
) -> None:
    modules, parameters, values = before
    assert {name: id(each) for name, each in model.named_modules()} == {
        name: id(each) for name, each in modules.items()
    }
    now = dict(model.named_parameters())
    assert {name: id(each) for name, each in now.items()} == {name: id(each) for name, each in parameters.items()}
    for name, value in values.items():
        assert_same(now[name].detach(), value)


def last_file(folder: Path) -> Path:
    """The file that is read last: of the tensors in it, some of layers that are read before."""
    return folder / FILE


def zeroed(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        if f'"{LAST}.weight_scale"'.encode() in file.read_bytes():
            replace_tensors(file, {f"{LAST}.weight_scale": torch.zeros(96, 4, dtype=torch.uint8)})


def in_last(**changes: Tensor | None) -> Callable[[Path], Any]:
    return lambda folder: replace_tensors(last_file(folder), changes)


def same_length(folder: Path) -> None:
    """The tensors of the last file as bytes of another dtype: a header that has changed, in a file that is whole."""

    def edit(header: dict[str, Any]) -> None:
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] == "BF16":
                entry["dtype"] = "I16"

    edit_header(last_file(folder), edit)


def names_of(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return set(opened.keys())


AFTER_OPENING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a scale was never written": (zeroed, rf"{LAST}\.weight_scale .*all scales are 0"),
    "truncated": (
        lambda folder: last_file(folder).write_bytes(last_file(folder).read_bytes()[:-1]),
        f"{FILE}: .* cannot be",
    ),
    "emptied": (lambda folder: last_file(folder).write_bytes(b""), f"{FILE}: .* cannot be read"),
    "removed": (lambda folder: last_file(folder).unlink(), f"{FILE}: .* cannot be read"),
    "a directory": (
        lambda folder: (last_file(folder).unlink(), last_file(folder).mkdir()),
        f"{FILE}: .* cannot be read",
    ),
    "other tensors": (
        lambda folder: last_file(folder).write_bytes((folder / FILE.replace("3-", "1-")).read_bytes()),
        FILE,
    ),
    "other shapes": (
        lambda folder: replace_tensors(last_file(folder), dict.fromkeys(names_of(last_file(folder)), torch.zeros(3))),
        f"in {FILE}.* has become F32 \\[3\\]: the file has changed",
    ),
    "other dtypes": (same_length, f"in {FILE}.* has become I16 .*: the file has changed"),
}


@pytest.mark.parametrize("dequant", [False, True])
@pytest.mark.parametrize("case", AFTER_OPENING)
def test_files_that_change_after_opening_leave_the_model_alone(tmp_path: Path, case: str, dequant: bool) -> None:
    edit, found = AFTER_OPENING[case]
    path, content = made(tmp_path, "modelopt", random_content(layers=LAYERS), shards=3)
    checkpoint = assert_opens_as(path, content)
    model = model_for(content)
    before = state(model)
    edit(path)
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(CheckpointError, match=found):
        load_into(model, checkpoint, dequant, progress=False)
    assert_untouched(model, before)
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == files


BEFORE_OPENING: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a tensor is missing": ({"model.norm.weight": None}, r"nothing in it for the model's model\.norm\.weight"),
    "a bias is missing": ({f"{next(iter(LAYERS))}.bias": None}, r"nothing in it for the model's .*\.bias"),
    "a tensor more": ({"model.norm.bias": torch.zeros(128)}, r"the model has no place for model\.norm\.bias"),
    "a tensor of another shape": (
        {"lm_head.weight": torch.zeros(48, 64)},
        r"lm_head\.weight is \[48, 128\] in the model",
    ),
    "a layer of another shape": (
        {
            f"{LAST}.weight": torch.zeros(96, 64, dtype=torch.uint8).view(torch.float8_e4m3fn),
            f"{LAST}.weight_scale": torch.zeros(96, 2, dtype=torch.uint8),
        },
        rf"{LAST}\.weight is \[96, 128\] in the model, the checkpoint has {LAST}\.weight \(F8_E4M3 \[96, 64\]",
    ),
}


@pytest.mark.parametrize("case", BEFORE_OPENING)
def test_a_checkpoint_of_another_model_leaves_the_model_alone(tmp_path: Path, case: str) -> None:
    changes, found = BEFORE_OPENING[case]
    path, content = made(tmp_path, "modelopt", random_content(layers=LAYERS))
    replace_tensors(path / "model.safetensors", changes)
    model = model_for(content)
    before = state(model)
    with pytest.raises(CheckpointError, match=found):
        load_into(model, open_checkpoint(path), progress=False)
    assert_untouched(model, before)


def test_without_an_error_every_tensor_is_another(tmp_path: Path) -> None:
    path, content = made(tmp_path, "modelopt", random_content(layers=LAYERS), shards=3)
    model = model_for(content)
    before = state(model)
    load_into(model, open_checkpoint(path), True, progress=False)
    for name, parameter in model.named_parameters():
        assert parameter is not before[1][name]
    last = content.layers[LAST]
    assert_same(model.get_parameter(f"{LAST}.weight").detach(), reference.dequant(last.weight, last.scale))
