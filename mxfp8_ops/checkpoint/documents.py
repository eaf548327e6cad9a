"""The JSON files beside the tensors of a checkpoint: their names, and reading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError

Json = dict[str, Any]

CONFIG = "config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
MODELSLIM_DESCRIPTION = "quant_model_description.json"
COMPRESSED_CONFIG = "quantization_config.json"
INDEX_SUFFIX = ".index.json"
"""Of any index of shards; ``SAFETENSORS_INDEX`` is that of one whose shards are safetensors files."""
SAFETENSORS_INDEX = f".safetensors{INDEX_SUFFIX}"


def read_json(path: Path) -> Json:
    """The object in a JSON file; CheckpointError where it is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, or no regular one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, got {type(value).__name__}")
    return value
