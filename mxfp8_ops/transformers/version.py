"""Which transformers the plug-in works with; imports nothing of it, as an older one may not have what there is now."""

from __future__ import annotations

_OLDEST = (5, 23)


def check_version(version: str) -> None:
    """Raises ImportError for a transformers whose loader lacks what a quantizer of this package needs."""
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        raise ImportError(
            f"mxfp8_ops.transformers needs transformers {_OLDEST[0]}.{_OLDEST[1]} or later, got {version}: "
            "pip install -U mxfp8-ops[transformers]"
        )
