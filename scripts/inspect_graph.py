"""What the lowering does to a model: its graph before and after as a diff, and the report of its weights.

FACTORY takes no arguments and returns (model, example_inputs): a module or function, and a tuple of
positional or a dict of keyword arguments. It is compiled with backend="mxfp8", without gradients and
without Inductor's caches.

Exit status: 0, also when there is nothing MXFP8 in the model; 2 after an error, which is one line.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported once the arguments are known to be good
    from lowering.report import GraphReport

FLAG = {"on": True, "off": False, "unset": None}
FLAG_VARIABLES = ("MXFP8_DEQUANT_AT_LOAD", "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD")


class Failure(Exception):
    """Something the user can put right, said in one line."""


def main() -> int:
    args = parse_arguments()
    # A graph found in a cache is not printed: Inductor generates no post-grad graph for it.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    if args.freezing:
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"  # read when torch is imported: Dynamo has to see it too
    if args.dequant_at_load == "unset":
        for variable in FLAG_VARIABLES:
            os.environ.pop(variable, None)
    try:
        model, positional, named = make(load(args.factory))
        graphs = compile_once(model, positional, named, FLAG.get(args.dequant_at_load), args.dynamic)
    except Failure as failure:
        print(f"inspect_graph: {failure}", file=sys.stderr)
        return 2
    show(graphs, args.context, args.freezing)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="importable from here or from the current folder")
    parser.add_argument(
        "--dequant-at-load", choices=FLAG, help="the flag; without this option what the environment says"
    )
    parser.add_argument("--freezing", action="store_true", help="with Inductor's freezing; prints its graph as well")
    parser.add_argument("--dynamic", action="store_true", help="with dynamic shapes")
    parser.add_argument("--context", type=int, default=3, help="unchanged lines around a change (default 3)")
    return parser.parse_args()


def load(name: str) -> Callable[[], object]:
    """The factory ``package.module:function``."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise Failure(f"expected MODULE:FACTORY, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise Failure(f"cannot import {module_name}: {one_line(error)}") from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise Failure(f"{module_name} has no function {function_name}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise Failure(f"{name} must take no arguments: {one_line(error)}") from error
    return factory


def make(factory: Callable[[], object]) -> tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]:
    """The model, its positional and its keyword arguments."""
    try:
        made = factory()
    except Exception as error:
        raise Failure(f"the factory raised {one_line(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        raise Failure(f"the factory must return (model, example_inputs), got {type(made).__name__}")
    model, inputs = made
    if isinstance(inputs, dict):
        return model, (), inputs
    if isinstance(inputs, (tuple, list)):
        return model, tuple(inputs), {}
    raise Failure(f"example_inputs must be a tuple or a dict, got {type(inputs).__name__}")


def compile_once(
    model: Callable[..., object],
    positional: tuple[Any, ...],
    named: dict[str, Any],
    dequant_at_load: bool | None,
    dynamic: bool,
) -> list[GraphReport]:
    """Compiles ``model`` by calling it, and returns the reports of its graphs."""
    import torch

    import lowering

    options: dict[str, Any] = {"dequant_at_load": dequant_at_load}
    compiled = torch.compile(model, backend="mxfp8", options=options, dynamic=dynamic or None)
    try:
        with lowering.report.collect() as graphs, torch.no_grad():
            compiled(*positional, **named)
    except Exception as error:
        raise Failure(f"the compiled model raised {one_line(error)}") from error
    return graphs


def show(graphs: list[GraphReport], context: int, freezing: bool) -> None:
    shown = [graph for graph in graphs if graph.weights]
    for number, graph in enumerate(shown, start=1):
        print(f"== graph {number} of {len(shown)}\n")
        before, after = graph.before.splitlines(), graph.after.splitlines()
        changes = difflib.unified_diff(before, after, "before", "after", n=context, lineterm="")
        print("\n".join(changes) or "(the graph is unchanged)")
        if freezing:
            for text in graph.post_grad:
                print(f"\n== graph {number}, as Inductor has it after freezing\n\n{text}")
        print(f"\n== graph {number}, weights\n\n{graph}\n")
    others = len(graphs) - len(shown)
    if not shown:
        print(f"note: no MXFP8 weight in {others} graph(s): swap linears with mxfp8_ops.quantize_(model)")
    elif others:
        print(f"note: {others} more graph(s) without MXFP8 weights")


def one_line(error: BaseException) -> str:
    """The error in a line; of one that Dynamo wrapped, the error inside."""
    while type(error).__module__.startswith("torch._dynamo") and (inner := error.__cause__ or error.__context__):
        error = inner
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {message}"


if __name__ == "__main__":
    sys.exit(main())
