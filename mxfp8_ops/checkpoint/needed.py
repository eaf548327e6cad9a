"""What checkpoints need beyond torch: an extra of this package."""

from __future__ import annotations

from importlib.util import find_spec

for _name in ("safetensors", "tqdm"):
    if find_spec(_name) is None:
        raise ImportError(f"checkpoints need {_name}: pip install mxfp8-ops[checkpoint]")
