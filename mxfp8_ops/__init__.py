"""MXFP8 weights in PyTorch on hardware without MX units: operators, reference, modules."""

from .convert import LayerSummary, dequantize_at_load_, pack_, quantize_
from .format import BLOCK_SIZE
from .functional import dequant, linear, linear_packed, pack, quantize, unpack
from .nn import Mxfp8Linear

__all__ = [
    "BLOCK_SIZE",
    "LayerSummary",
    "Mxfp8Linear",
    "dequant",
    "dequantize_at_load_",
    "linear",
    "linear_packed",
    "pack",
    "pack_",
    "quantize",
    "quantize_",
    "unpack",
]

__version__ = "0.1.0"
