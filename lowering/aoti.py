"""Ahead of time: a model with MXFP8 weights as a package of AOTInductor, which runs without this package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import compat, passes
from .at_load import FoldOnlyDequant
from .portable import dequant_loops, folds, program

_DECIDED = (compat.FREEZING, compat.FOLD_WHEN_LOADED)


def aoti_package(
    model: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    dequant_at_load: bool | None = None,
    fused: bool = False,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Exports and compiles ``model`` into the package ``path``, for ``torch._inductor.aoti_load_package(path)`` in a
    process that need not have this package, nor Triton, nor the model's source.

    Weights are in the package as they are in the model, one byte an element. What happens to them then:

    - flag off or unset: every call dequantizes each weight as a whole, to x's dtype, for a plain linear;
    - flag on: the first call after loading does so (AOTInductor folds constants then, not in the load itself), and
      later ones find the dequantized weights. The bytes stay in memory beside them: bfloat16 takes 3 bytes an element.
      Within sub-graphs (``torch.cond``) every call dequantizes;
    - ``fused``: a Triton kernel reads the bytes in every call, and no dequantized weight is ever in memory.

    The answers are those of eager mode up to what Inductor does to the operators around the linears, and with ``fused``
    up to the order of summation. Neither ``model`` nor any setting is changed. A package is for the kind of device, the
    processor and the version of torch that it was made with. ``MXFP8_PASSES`` and ``MXFP8_KERNELS`` do not matter here.

    Args:
        model: for inference: in the mode, train or eval, in which it is. Packed layers become canonical in the package.
        inputs: an example of what it is called with: positional arguments, or keyword arguments by name.
        path: of the package, ending in ``.pt2``. Replaced when the new one is complete, and left alone otherwise.
        dequant_at_load: beats ``MXFP8_DEQUANT_AT_LOAD`` unless None.
        fused: one kernel for each linear, in a configuration for the number of rows of ``inputs``, or for some 64 where
            that is dynamic. For CUDA devices, and not together with the flag on.
        dynamic_shapes: as of ``torch.export.export``. Without it every size is that of ``inputs``.
        options: more options of Inductor.

    Returns:
        ``path``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the path cannot be, the flag is neither on nor off, a weight was released, an operator of this
            package cannot be packaged, the device cannot read e4m3 without ``fused``, or ``fused`` comes with the flag
            on or without a CUDA device and Triton.
        Exceptions of ``torch.export`` and Inductor are passed on.
    """
    target, configuration = _checked_path(path), _checked_options(options)
    exported = program(model, inputs, dequant_at_load=dequant_at_load, fused=fused, dynamic_shapes=dynamic_shapes)
    once = folds(dequant_at_load, fused) and bool(dequant_loops(exported.graph))
    configuration |= {compat.FREEZING: False, compat.FOLD_WHEN_LOADED: once}
    if once:
        configuration = passes.install(configuration, compat.POST_GRAD, FoldOnlyDequant())
    # In a folder, not under another name: the name is in the package.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        made = Path(folder, target.name)
        with passes.lowering():  # a process-wide enable() has nothing to do here
            compat.compile_and_package(exported, made, configuration)
        made.replace(target)
    return target


def _checked_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"the path of a package must end in .pt2, got {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {str(target.parent)!r} to write {target.name} to")
    if target.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, a package is a file")
    return target


def _checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(options or {})
    for name in _DECIDED:
        if name in given:
            raise ValueError(f"option {name!r} follows from dequant_at_load and cannot be given, got {given[name]!r}")
    return given
