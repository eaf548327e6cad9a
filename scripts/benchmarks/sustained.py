"""Linears that nothing interrupts, one kind after the other: how long a call takes once the device has become as warm
as it gets, and slows its clock to keep within its power. Side by side, in turns, all kinds have the same clock.
"""

from __future__ import annotations

import torch

from .devices import Device
from .options import SUSTAINED_ROWS, Options, Records
from .weight import multiplications

SECONDS = 0.5
"""For which a kind runs before it is timed, and then for the time."""
KINDS = ("B", "packed", "canonical")


def sustained(device: Device, options: Options) -> Records:
    """One record for each shape and number of rows."""
    dtype = getattr(torch, options.dtype)
    for n, k in options.shapes:
        weights = [device.weight((n, k), dtype) for _ in range(device.copies(n * k))]
        for m in SUSTAINED_ROWS:
            columns = multiplications(weights, torch.randn(m, k, dtype=dtype, device=device.place))
            times = {}
            for kind in KINDS:
                us, state = device.timer.sustained(columns[kind], SECONDS, device.state)
                times[kind] = {"us": round(us, 4), **state}
            ratios = {kind: round(times[kind]["us"] / times["B"]["us"], 4) for kind in KINDS}
            yield {"n": n, "k": k, "m": m, "times": times, "ratios": ratios}
        del weights, columns
        device.release()
