"""What the lowering does to a model: the console command ``mxfp8-inspect``, run from a checkout."""

from __future__ import annotations

import sys

from lowering.inspect.cli import main

if __name__ == "__main__":
    sys.exit(main())
