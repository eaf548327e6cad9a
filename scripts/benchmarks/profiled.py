"""What Nsight Compute watches: for every shape and number of rows, R and the linear on a weight of either form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mxfp8_ops

from .bandwidth import CALLS
from .devices import DEVICES
from .options import BANDWIDTH_ROWS
from .weight import Weight

FUNCTIONS: dict[str, Callable[[Weight, Tensor], Tensor]] = {
    "linear_packed": Weight.linear_packed,
    "linear": lambda weight, x: mxfp8_ops.linear(x, *weight.canonical),
}


def main(words: Sequence[str]) -> None:
    """Only what counts is between start and stop of the profiler. R comes before every call, and tells calls apart."""
    dtype = getattr(torch, words[0])
    device = DEVICES["cuda"].open()
    for word in words[1:]:
        n, k = map(int, word.split("x"))
        weight = device.weight((n, k), dtype)
        for m in BANDWIDTH_ROWS:
            x = torch.randn(m, k, dtype=dtype, device=device.place)
            for name in CALLS:
                for profiled in (False, True):  # what is not has compiled, or read Triton's cache
                    torch.cuda.synchronize()
                    if profiled:
                        torch.cuda.profiler.start()
                    device.read(weight.stored, device.read_configurations[0])
                    FUNCTIONS[name](weight, x)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        del weight
        device.release()


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
