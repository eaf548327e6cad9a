"""What sanitizers watch: cases, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from mxfp8_ops.packing import PACKED_FOR

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """Something to run, which raises AssertionError where its result is wrong."""

    name: str
    run: Callable[[], None]


def run_all(cases: Iterable[Case]) -> int:
    """Runs them, and returns how many. The last name printed is that of the case in which a worker hangs or fails."""
    done = 0
    for case in cases:
        print(case.name, flush=True)
        torch.manual_seed(0)
        case.run()
        done += 1
    return done


def packed_for(dtype: torch.dtype) -> torch.dtype:
    """For which x a weight is packed that meets x of ``dtype``: float32 makes do with another."""
    return dtype if dtype in PACKED_FOR else torch.bfloat16
