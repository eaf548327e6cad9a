"""How formats say which modules they mean: by whole names always, as "proj" is also the end of "q_proj"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from .errors import CheckpointError

OF_ACTIVATIONS = (".k_scale", ".v_scale", ".q_scale", ".input_scale", ".activation_scale")
"""Endings of tensors that only those use who quantize activations or the KV cache."""


def wildcards(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` is one of ``patterns``, in which ``*`` and ``?`` stand for any characters, dots included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def names_or_regexes(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` is one of ``patterns``, of which those after ``re:`` are regular expressions for its beginning.
    compressed-tensors says it so.
    """
    return any(
        regex(pattern[3:]).match(name) is not None if pattern.startswith("re:") else name == pattern
        for pattern in patterns
    )


def regex(pattern: str) -> re.Pattern[str]:
    """``pattern`` compiled; CheckpointError where it is no regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{pattern!r:.80} is no regular expression: {error}") from error


def modules(name: str, keys: Iterable[str]) -> bool:
    """Whether ``name`` is one of the modules ``keys``, lies in one, or ends with one: ``lm_head``, ``model.layers.0``,
    ``mlp.gate``. Whole components only.
    """
    return any(name == key or name.startswith(f"{key}.") or name.endswith(f".{key}") for key in keys)
