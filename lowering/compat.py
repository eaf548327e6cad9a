"""Every private torch API the lowering stands on, each behind one function that says which versions have
which form: those that only look at a compile are in ``introspection``. Read against torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import _lazy_graph_module

Compile = Callable[[fx.GraphModule, Sequence[Any], dict[str, Any]], Callable[..., Any]]
"""Compiles a graph for example inputs, under patches of Inductor's configuration."""

PRE_GRAD = "pre_grad_custom_pass"
JOINT_PRE = "joint_custom_pre_pass"
JOINT_POST = "joint_custom_post_pass"
POST_GRAD = "post_grad_custom_post_pass"


# --- Inductor's pass slots -------------------------------------------------------------------------------


class _Chain(CustomGraphPass):
    """Several passes in a slot that holds one (torch 2.11)."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """None, which turns caching off, as soon as one pass has no identity of its own."""
        ids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in ids else tuple(ids)


def passes_in(slot: object) -> tuple[Any, ...]:
    """The passes a slot's value stands for: none, one, a chain or (torch >= 2.13) a list."""
    if slot is None:
        return ()
    if isinstance(slot, _Chain):
        return slot.passes
    return tuple(slot) if isinstance(slot, (list, tuple)) else (slot,)


def as_slot(passes: Sequence[Any]) -> Any:
    """The value of a slot that runs ``passes`` in order: a list where the slot takes one (torch >= 2.13)."""
    if hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return list(passes)
    return passes[0] if len(passes) == 1 else _Chain(passes)


def current_passes(slot_name: str) -> tuple[Any, ...]:
    """The passes Inductor's configuration holds in a slot right now."""
    return passes_in(getattr(torch._inductor.config, slot_name))


def run_pre_grad_on_every_compile() -> dict[str, Any]:
    """Options that make pre-grad passes run before the cache look-up, so that they see cached graphs too.
    torch 2.11 always does so.
    """
    return {"pre_grad_pass_timing": "early"} if hasattr(torch._inductor.config, "pre_grad_pass_timing") else {}


def autocast_state() -> tuple[Any, ...]:
    """What autocast does on each device now. Until torch 2.11 AOTAutograd's cache keys know whether it is on,
    but not its dtype, and a graph for one would be found for another; a pass's identity makes up for it.
    """
    devices = torch._C._autocast_supported_devices()
    return tuple((device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device))


# --- Inductor as a backend -------------------------------------------------------------------------------


def inductor(mode: str | None, options: dict[str, Any]) -> tuple[dict[str, Any], Compile]:
    """What ``torch.compile`` itself does for this mode and these options: the patches of Inductor's
    configuration that they stand for, and a function that compiles a graph under such patches.
    """
    wrapper = torch._TorchCompileInductorWrapper(mode, None, None)
    wrapper.apply_options(options)

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
        wrapper.config = config_patches  # torch 2.11 takes no patches in the call
        return wrapper(gm, inputs)

    return wrapper.config, compile_graph


FREEZING = "freezing"
FOLD_WHEN_LOADED = "aot_inductor.use_runtime_constant_folding"


def compile_and_package(program: torch.export.ExportedProgram, path: Path, options: dict[str, Any]) -> None:
    """AOTInductor: compiles an exported program into the package ``path``. Alike in torch 2.11 and 2.13.

    With the option ``FOLD_WHEN_LOADED`` what depends on constants alone is computed by the first call after loading.
    AOTInductor writes into the dict of the setting ``metadata``: it gets one of its own.
    """
    name = "aot_inductor.metadata"
    metadata = options.get(name, torch._inductor.config.aot_inductor.metadata)
    configs = {**options, name: dict(metadata)}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def packages_e4m3_on_cpu() -> bool:
    """Whether AOTInductor can compile code for the CPU that reads float8: torch 2.11 does not declare the type in the
    C++ that it writes, 2.13 does. (2.12 was not tried.)
    """
    return torch.__version__ >= "2.12"


def compile_fx_module() -> Any:
    """The module whose ``compile_fx`` torch's wrapper looks up at every call."""
    import torch._inductor.compile_fx

    return torch._inductor.compile_fx


# --- what Dynamo is doing, and what it tells of a graph's inputs -------------------------------------------


def is_tracing() -> bool:
    """Whether Dynamo is at work in this thread, as opposed to a compiled or an eager call. Until torch 2.11
    ``torch.compiler.is_compiling()`` says so only to the code that is traced.
    """
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def compiler_is_on() -> bool:
    """Whether ``torch.compile`` does anything: not under ``TORCH_COMPILE_DISABLE``."""
    return not torch._dynamo.config.disable


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The module or function that ``torch.compile`` was given, if it was."""
    return getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None) or model


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be changed. Dynamo's own must not be: it reads it again after the backend.

    Keeps what AOTAutograd takes from Dynamo: ``gm.meta``, ``_param_name_to_source`` and each input's
    ``_dynamo_source``, which ``fx`` does not copy. Sub-graphs of higher-order operators are copied as well.
    """
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, copies)
    output = graph.output(result)
    output.meta.update(gm.graph.output_node().meta)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    with _lazy_graph_module._use_lazy_graph_module(True):  # its code is written when somebody calls it
        copy = _lazy_graph_module._make_graph_module(gm, graph)
    for name, value in gm.__dict__.items():
        copy.__dict__.setdefault(name, value)
    copy.meta.update(gm.meta)
    for node in graph.find_nodes(op="get_attr"):
        sub = getattr(copy, node.target, None) if node.target.isidentifier() else None
        if isinstance(sub, fx.GraphModule) and sub is getattr(gm, node.target):
            setattr(copy, node.target, copy_graph_module(sub))
    return copy


def is_dynamo_graph(graph: fx.Graph) -> bool:
    """Whether a graph is what Dynamo gave to the backend, as opposed to a sub-graph of it. On the CPU torch 2.11
    traces graphs again before it freezes them, and what Dynamo knew of their nodes is lost.
    """
    known = all(hasattr(node, "_dynamo_source") for node in graph.find_nodes(op="placeholder"))
    return known or not any("example_value" in node.meta for node in graph.nodes)


def add_static_input(after: fx.Node, number: int, label: str, example: object) -> fx.Node:
    """Adds the ``number``-th new placeholder, after the last one so far, called ``label`` in reports.

    AOTAutograd counts it among the static inputs, as it does parameters: CUDA graphs then do not copy it. The
    marks are those Dynamo sets; a source of None is allowed more than once.
    """
    with after.graph.inserting_after(after):
        node = after.graph.placeholder(f"folded_{number}_" + re.sub(r"\W", "_", label))
    node._dynamo_source = None
    node.meta["mxfp8_label"] = label
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta["example_value"] = example
    return node


def is_static_input(node: fx.Node) -> bool:
    """Whether a graph input is part of the program rather than of the call: a parameter or buffer, a tensor
    attribute of a module, a global or a closure variable. Everything else may differ at every call.
    """
    if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return True
    source = getattr(node, "_dynamo_source", None)
    while source is not None:
        if type(source).__name__ == "GlobalSource" or getattr(source, "is_derefed_cell_contents", False):
            return True
        if "NNModule" in type(source).__name__ or str(getattr(source, "guard_source", "")).endswith("NN_MODULE"):
            return True
        source = getattr(source, "base", None)
    return False


def source_name(node: fx.Node) -> str:
    """Dynamo's name of an input or attribute, such as ``L['self']._modules['fc'].weight``. A source's name is
    a method until torch 2.11.
    """
    source = getattr(node, "_dynamo_source", None)
    if node.op == "get_attr":
        source = getattr(node.graph.owning_module, "_param_name_to_source", {}).get(node.target)
    if source is None:
        return str(node.target)
    return source.name() if callable(source.name) else source.name


def size_hint(size: int | torch.SymInt) -> int:
    """A size as it is in the example inputs, without a guard that it stays so; 0 if only the data tells."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def without_guards(value: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """For trying something on a fake tensor of Dynamo's that is to leave no guard on its sizes."""
    shape_env = getattr(getattr(value, "fake_mode", None), "shape_env", None)
    return contextlib.nullcontext() if shape_env is None else shape_env.suppress_guards()


def static_fake(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without data in the fake mode of the compilation under way, or itself outside of one.

    Its sizes are constants, and stay so for as long as this fake lives: when AOTAutograd meets the tensor it
    finds this fake. Left to itself it would make the sizes symbols, which Dynamo has no guard for.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return context.fake_mode.from_tensor(tensor, static_shapes=True)


def addresses(tensors: Sequence[torch.Tensor]) -> Callable[[Sequence[torch.Tensor]], bool]:
    """Tells whether as many tensors lie where these do: by what CUDA graphs use, which torch's builds for CPUs lack."""
    known = list(map(torch.Tensor.data_ptr, tensors))
    check, positions = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None), list(range(len(known)))
    if check is None:
        return lambda tensors: list(map(torch.Tensor.data_ptr, tensors)) == known
    return lambda tensors: check(list(tensors), known, positions)
