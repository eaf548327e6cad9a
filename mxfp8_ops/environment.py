"""The environment variables of ``settings`` in a form that Dynamo guards.

Dynamo reads ``os.environ`` as a constant, without a guard, and guards any plain dict on its length, so that
every new variable would compile everything again. An attribute of a module it guards by reading it again and
comparing, and a module may compute its attributes.
"""

from __future__ import annotations

import os

DEQUANT_AT_LOAD = ("MXFP8_DEQUANT_AT_LOAD", "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD")
PASSES = "MXFP8_PASSES"
KERNELS = "MXFP8_KERNELS"
PACK_AT_LOAD = "MXFP8_PACK_AT_LOAD"
MERGE_LINEARS = "MXFP8_MERGE_LINEARS"
AUTOTUNE = "MXFP8_AUTOTUNE"  # these four no graph depends on
DEPENDENT_LAUNCH = "MXFP8_DEPENDENT_LAUNCH"
CACHE_DIR = "MXFP8_CACHE_DIR"
CPU_LEVEL = "MXFP8_CPU_LEVEL"
VARIABLES = (*DEQUANT_AT_LOAD, PACK_AT_LOAD, MERGE_LINEARS, PASSES, KERNELS)
"""What graphs depend on."""

_ENCODED = {
    name: getattr(os.environ, "encodekey", str)(name) for name in (*VARIABLES, AUTOTUNE, DEPENDENT_LAUNCH, CPU_LEVEL)
}
_ENCODED_VARIABLES = [_ENCODED[name] for name in VARIABLES]
_KERNELS, _AUTOTUNE, _DEPENDENT = (_ENCODED[name] for name in (KERNELS, AUTOTUNE, DEPENDENT_LAUNCH))
_ALL_UNSET = repr([None] * len(VARIABLES))


def surely_unset(name: str) -> bool:
    """Whether a variable is not set. The dict behind ``os.environ`` says so without an exception: 2 us less a call."""
    data = getattr(os.environ, "_data", None)
    return data is not None and _ENCODED[name] not in data


def launch_surely_unset() -> bool:
    """The same for all variables on which it depends what an operator launches, in a fifth of the time of three calls:
    read in every one.
    """
    data = getattr(os.environ, "_data", None)
    return data is not None and not (_KERNELS in data or _AUTOTUNE in data or _DEPENDENT in data)


def __getattr__(name: str) -> str:
    if name == "words":  # one string: of a list Dynamo would guard the length and what it has seen used
        data = getattr(os.environ, "_data", None)
        if data is not None and data.keys().isdisjoint(_ENCODED_VARIABLES):  # read at every call of a compiled graph
            return _ALL_UNSET
        return repr([os.environ.get(variable) for variable in VARIABLES])
    raise AttributeError(name)
