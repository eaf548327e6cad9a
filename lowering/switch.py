"""``enable()`` and ``disable()``: the lowering for every ``torch.compile`` of the process.

This is a patch, and the only one: torch's wrapper looks ``compile_fx`` up in its module at every compile, so
replacing that one attribute reaches every plain ``torch.compile(m)``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from mxfp8_ops import settings

from . import backend, compat, passes
from .backend import Options

_lock = threading.RLock()
_patch: _Patch | None = None


class _Patch:
    """Our ``compile_fx``. Once retired it passes every call on: others may have wrapped it meanwhile."""

    def __init__(self, original: Callable[..., Any], options: Options) -> None:
        self.original = original
        self.options: Options | None = options

    def __call__(self, model_: Any, example_inputs_: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        options = self.options
        if options is None or passes.is_lowering() or not isinstance(model_, fx.GraphModule):
            return self.original(model_, example_inputs_, *args, **kwargs)
        patches = dict(kwargs.pop("config_patches", None) or {})

        def inductor(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
            return self.original(gm, inputs, *args, config_patches=config_patches, **kwargs)

        for each in compat.passes_in(patches.get(compat.POST_GRAD)):
            if isinstance(each, passes.LowerPass):  # lowering.options(...) wins
                said = {name: getattr(each, name) for name in ("dequant_at_load", "pack_at_load")}
                options = replace(options, **{name: value for name, value in said.items() if value is not None})
        return backend.lower(model_, example_inputs_, options, patches, inductor)


def enable(
    dequant_at_load: bool | None = None,
    release_quantized: bool = False,
    pack_at_load: bool | None = None,
    merge_linears: bool | None = None,
) -> None:
    """Makes every ``torch.compile(m)`` of this process fold, keep and report as ``backend="mxfp8"`` does.

    Calling it again changes the options. Graphs compiled before are compiled again at their next call.

    Args:
        dequant_at_load: beats ``MXFP8_DEQUANT_AT_LOAD`` unless None.
        release_quantized, pack_at_load, merge_linears: see ``lowering.Options``.
    """
    global _patch
    options = Options(dequant_at_load, release_quantized, pack_at_load, merge_linears)
    module = compat.compile_fx_module()
    with _lock:
        if _patch is None:
            _patch = module.compile_fx = _Patch(module.compile_fx, options)
        _patch.options = options
        settings.set_compile_options(options)


def disable() -> None:
    """Undoes ``enable()``; does nothing when it is not enabled."""
    global _patch
    module = compat.compile_fx_module()
    with _lock:
        if _patch is None:
            return
        _patch.options = None
        if module.compile_fx is _patch:
            module.compile_fx = _patch.original
        _patch = None
        settings.set_compile_options()
