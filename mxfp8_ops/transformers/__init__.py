"""MXFP8 in transformers: importing this registers a quantizer for ``from_pretrained`` and ``save_pretrained``.

``quant_method`` "mxfp8_ops" is ours, and "modelopt" where transformers has none of its own. The other formats belong to
quantizers of transformers: ``take_over()`` puts ours in their place, ``give_back()`` undoes it.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError("mxfp8_ops.transformers needs transformers: pip install mxfp8-ops[transformers]") from error

from .version import check_version

check_version(_transformers.__version__)

from .config import Mxfp8Config  # noqa: E402
from .quantizer import Mxfp8HfQuantizer, attach  # noqa: E402
from .registry import give_back, register, take_over  # noqa: E402

register()

__all__ = ["Mxfp8Config", "Mxfp8HfQuantizer", "attach", "give_back", "take_over"]
