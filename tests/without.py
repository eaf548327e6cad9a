"""Runs packages of AOTInductor where mxfp8_ops, lowering and Triton cannot be imported. A program.

Its arguments are a package, a file of inputs for several calls, and one for the outputs. With a further file, of
constants, the package takes these instead of its own, and their scales are raised by one in place between two calls.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

BLOCKED = ("mxfp8_ops", "lowering", "triton")


class Filtered(importlib.abc.MetaPathFinder):
    """Finds what others find, but for what is blocked: there is no such module, whoever asks."""

    def __init__(self, others: Sequence[Any]) -> None:
        self.others = tuple(others)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] in BLOCKED:
            return None
        return next(filter(None, (each.find_spec(name, path, target) for each in self.others)), None)


def block() -> None:
    sys.meta_path[:] = [Filtered(sys.meta_path)]
    for name in BLOCKED:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} can be imported")


def main(package: str, inputs: str, outputs: str, constants: str | None = None) -> None:
    import torch

    model, calls = torch._inductor.aoti_load_package(package), torch.load(inputs)
    if constants is None:
        results = [model(*arguments) for arguments in calls]
    else:
        results = with_constants(model, calls[0], torch.load(constants))
    torch.save((results, model.get_constant_fqns()), outputs)
    assert not [name for name in sys.modules if name.split(".")[0] in BLOCKED]
    assert not hasattr(torch.ops.mxfp8, "linear")


def with_constants(model: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> list[Any]:
    """Three calls: with the constants, with scales raised behind the package's back, after it was told."""
    model.load_constants(constants, check_full_update=True, user_managed=True)
    results = [model(*arguments)]
    for name, tensor in constants.items():
        if name.endswith("scale"):
            tensor.add_(1)
    results.append(model(*arguments))
    model.load_constants(constants, check_full_update=True, user_managed=True)
    return [*results, model(*arguments)]


if __name__ == "__main__":
    block()
    main(*sys.argv[1:])
