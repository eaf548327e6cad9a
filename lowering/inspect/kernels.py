"""Finding one's way in the code that Inductor generates: which kernel computes which node of a graph.

Under ``explain`` Inductor says so itself: a comment before each call, ``# [Provenance debug handles] name:3``, and
a table from such handles to nodes of the post-grad graph. Otherwise there are only its comments about source
nodes, ``# Topologically Sorted Source Nodes: [linear], ...``, which loops on the CPU lack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..graph import CALLERS
from ..report import POST_GRAD, GraphReport
from ..text import Line
from ..weights import kernel_text

_HANDLES = re.compile(r"# \[Provenance debug handles\] (.*)")
_SOURCES = re.compile(r"# Topologically Sorted Source Nodes: \[(.*?)\]")
_DEFINITION = re.compile(r"^(\w+) = async_compile\.")
_CALL = re.compile(r"([A-Za-z_][\w.]*?)(?:\.run)?\(")


@dataclass(frozen=True)
class Kernel:
    """One call in a generated program.

    Attributes:
        name: of what it calls, such as ``extern_kernels.addmm`` or ``cpp_fused_relu_0``.
        nodes: names of the nodes of Dynamo's graph it computes, as far as is known.
        weights: MXFP8 weights that it reads, as far as is known.
        call: the line that calls it.
        definition: its source, "" for kernels of a library.
    """

    name: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    call: str
    definition: str


def kernels(graph: GraphReport) -> list[Kernel]:
    """The calls of a graph's generated programs, in the order they run."""
    lines: dict[str, list[Line]] = {}  # nodes of several graphs may have the same name
    for line in graph.lines(POST_GRAD):
        if line.target and line.target not in CALLERS:  # who calls a graph computes nothing itself
            lines.setdefault(line.node, []).append(line)
    found = []
    for code in graph.code:
        definitions, program = _split(code.text)
        for name, call, handle, sources in _calls(program, set(definitions)):
            computed = [line for node in code.handles.get(handle, ()) for line in lines.get(node, ())]
            nodes = dict.fromkeys((*sources, *(source for line in computed for source in line.sources)))
            weights = dict.fromkeys(weight for line in computed for weight in line.weights)
            found.append(Kernel(name, tuple(nodes), tuple(weights), call, definitions.get(name, "")))
    return found


def name_kernels(graph: GraphReport) -> None:
    """Puts into each weight's row the kernels that read it, where the generated code tells."""
    steps = kernels(graph)
    for row in graph.weights:
        names = [_readable(step.name, row.device) for step in steps if row.name in step.weights]
        if names:
            row.kernel = " + ".join(dict.fromkeys(names))


def _readable(name: str, device: str) -> str:
    found = re.fullmatch(r"torch\.ops\.mxfp8\.(\w+)\.default|extern_kernels\.mxfp8_(\w+?)(?:_cuda)?", name)
    return kernel_text(f"mxfp8.{found[1] or found[2]}", device) if found else name.removeprefix("torch.ops.")


def _split(code: str) -> tuple[dict[str, str], list[str]]:
    """The definitions of kernels by name, and the lines of the program around them."""
    definitions: dict[str, str] = {}
    program: list[str] = []
    name = ""
    body: list[str] = []
    for line in code.splitlines():
        if not name and (match := _DEFINITION.match(line)):
            name, body = match[1], []
        if not name:
            program.append(line)
            continue
        body.append(line)
        if line.startswith("'''") or (len(body) == 1 and line.endswith(")")):
            definitions[name] = "\n".join(body)
            name = ""
    return definitions, program


def _calls(program: list[str], defined: set[str]) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """The name, the line, the handle and the source nodes of every call of a kernel."""
    handles: dict[str, str] = {}
    sources: tuple[str, ...] = ()
    for line in map(str.strip, program):
        if match := _HANDLES.match(line):
            handles = {handle.rpartition(":")[0]: handle for handle in match[1].split(", ")}
        elif match := _SOURCES.match(line):
            sources = tuple(filter(None, (name.strip() for name in match[1].split(","))))
        elif not line.startswith("#"):
            for name in _CALL.findall(line):
                if name in defined or name.startswith(("extern_kernels.", "torch.ops.")):
                    yield name, line, handles.get(name, ""), sources
                    handles, sources = {}, ()
                    break
