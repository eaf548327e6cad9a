"""MXFP8 checkpoints: eleven dialects on disk, one form in memory."""

from __future__ import annotations

from . import needed  # noqa: F401  before what needs it
from .converting.converter import convert
from .errors import CheckpointError, Mismatch
from .layer import Mxfp8Weight
from .loading.load import load_into
from .loading.parallel import TensorParallel
from .reading import Checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Mismatch",
    "Mxfp8Weight",
    "TensorParallel",
    "convert",
    "load_into",
    "open_checkpoint",
]
