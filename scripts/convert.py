"""A checkpoint into MXFP8, out of it, or into another format of it: the console command ``mxfp8-convert``, run from a
checkout.
"""

from __future__ import annotations

import sys

from mxfp8_ops.checkpoint.converting.cli import main

if __name__ == "__main__":
    sys.exit(main())
