"""What a checkpoint says about itself, from the files that transformers has chosen to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import merged
from ..checkpoint.formats import WRITABLE, Description, Format, find
from ..checkpoint.reading import described


def describe(files: Sequence[str], quantization: dict[str, Any] | None) -> Description:
    """Configs and headers of a checkpoint.

    Args:
        files: its .safetensors files. Their folder may have the configs of ModelOpt and ModelSlim.
        quantization: its ``quantization_config``.

    Raises:
        CheckpointError: a file is damaged, or a tensor is in two of them.
    """
    paths = [Path(file) for file in files]
    folder = paths[0].parent
    return described(folder, quantization, merged(folder, paths))


def of_config(quantization: dict[str, Any]) -> Format:
    """The format that a ``quantization_config`` alone says; ValueError where it is none of ours."""
    return find(Description(quantization))


def writable(name: str) -> Any:
    """The format to save in; ValueError where ``name`` is none."""
    if name not in WRITABLE:
        raise ValueError(f"save_format must be one of {', '.join(WRITABLE)}, got {name!r}")
    return WRITABLE[name]
