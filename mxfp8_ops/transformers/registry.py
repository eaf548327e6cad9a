"""Which ``quant_method`` of a checkpoint leads to the quantizer of this package."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from transformers.quantizers import auto

from ..checkpoint.formats import FORMATS, Description
from .config import QUANT_METHOD, Mxfp8Config
from .quantizer import Mxfp8HfQuantizer

_SHARED_METHODS = ("modelopt", "mxfp8", "fp8", "compressed-tensors", "auto-round", "quark")

_taken: dict[str, type[Any]] = {}


def register() -> None:
    """Registers the quantizer as "mxfp8_ops", and as "modelopt" where transformers knows no such method."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(Mxfp8HfQuantizer)
    for method in (QUANT_METHOD, "modelopt"):
        if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            auto.register_quantization_config(method)(Mxfp8Config)


class TakeOver:
    """What ``take_over`` returns: as a context manager it gives back at the end what that call took."""

    def __init__(self, took: bool) -> None:
        self._took = took

    def __enter__(self) -> TakeOver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._took:
            give_back()


def take_over() -> TakeOver:
    """Lets ``from_pretrained`` use the quantizer of this package for MXFP8 checkpoints whose ``quant_method`` is one of
    transformers: "mxfp8", "fp8" with blocks of [1, 32] or [32, 32], "compressed-tensors", "auto-round" and "quark".

    For the process, until ``give_back()``, or ``with take_over(): ...`` for some calls. Checkpoints of these methods
    that are not MXFP8 go to transformers' own quantizers as before. A second call changes nothing.
    """
    took = not _taken
    mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in _SHARED_METHODS:
        theirs = mapping.get(method)
        if theirs is not None and method not in _taken and not issubclass(theirs, Mxfp8Config):
            _taken[method] = theirs
            mapping[method] = _ours_or(theirs)
    return TakeOver(took)


def give_back() -> None:
    """Undoes ``take_over``. Models that are loaded stay as they are."""
    while _taken:
        method, theirs = _taken.popitem()
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = theirs


def _ours_or(theirs: type[Any]) -> type[Any]:
    """``theirs``, but for a checkpoint in one of our formats ``from_dict`` makes an ``Mxfp8Config``."""

    def from_dict(cls: type[Any], config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return (Mxfp8Config if _is_ours(config_dict) else theirs).from_dict(config_dict, *args, **kwargs)

    return type(theirs.__name__, (theirs,), {"from_dict": classmethod(from_dict), "__doc__": theirs.__doc__})


def _is_ours(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` is that of an MXFP8 checkpoint; CheckpointError where it is only in part."""
    return any(each.match(Description(config)) for each in FORMATS)
