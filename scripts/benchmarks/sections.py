"""What is measured: sections, each a generator of records (see ``SECTIONS`` at the end)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mxfp8_ops

from . import cpu_kernels
from .bandwidth import bandwidth
from .devices import Device
from .options import BANDWIDTH_ROWS, HOST_SHAPE, SUSTAINED_ROWS, Options, Records, Shape
from .timing import Calls, cliffs, ratio, summary
from .weight import Weight, random_dense

ERROR_ROWS = 256
"""Rows of a result that are compared with float64, spread evenly."""
FORMS = ("packed", "canonical")
SUSTAINED = ("B", *FORMS)
SUSTAINED_SECONDS = 0.5
"""For which each of these runs before it is timed, and then for the time."""


def elementwise(device: Device, options: Options) -> Records:
    """Dequant and quantize, as fractions of the speed of a copy of as many bytes, once for each shape."""
    for n, k in options.shapes:
        moved = n * k * 3 + n * k // 32
        pairs = torch.empty(device.copies(moved), 2, moved // 2, dtype=torch.uint8, device=device.place)
        dense = [random_dense((n, k), torch.bfloat16, device.place) for _ in range(device.copies(moved))]
        weights = [mxfp8_ops.quantize(each) for each in dense]
        columns: dict[str, Calls] = {
            "copy": [partial(pair[0].copy_, pair[1]) for pair in pairs],
            **_elementwise_columns(weights, dense),
        }
        times = _times(device, columns, options)
        copy = times["copy"]["us"]
        fractions = {name: round(copy / times[name]["us"], 4) for name in columns if name != "copy"}
        yield {"n": n, "k": k, "bytes": moved, "times": times, "fractions": fractions}
        del pairs, dense, weights, columns
        device.release()


def elementwise_on_cpu(device: Device, options: Options) -> Records:
    """The same on the CPU, where memory that nobody has used yet costs more than writing to it: operators, whose
    results are new, beside a copy that makes as much of it, and kernels alone beside a copy over old memory.
    """
    for n, k in options.shapes:
        moved = n * k * 3 + n * k // 32
        copies = device.copies(moved)
        pairs = torch.ones(copies, 2, moved // 2, dtype=torch.uint8)
        dense = [random_dense((n, k), torch.bfloat16, device.place) for _ in range(copies)]
        weights = [mxfp8_ops.quantize(each) for each in dense]
        columns: dict[str, Calls] = {
            "copy": [partial(pair[0].copy_, pair[1]) for pair in pairs],
            "copy of dense": [each.clone for each in dense],
            "copy of quantized": [weight.clone for weight, _ in weights],
        }
        copied = {"copy": moved, "copy of dense": 4 * n * k, "copy of quantized": 2 * n * k}
        operators, alone = _elementwise_columns(weights, dense), cpu_kernels.columns(weights, dense)
        times = _times(device, columns | operators | alone, options)
        speeds = {name: copied.get(name, moved) / time["us"] for name, time in times.items()}
        like = {name: "copy of dense" if "dequant" in name else "copy of quantized" for name in operators}
        like |= dict.fromkeys(alone, "copy")
        fractions = {name: round(speeds[name] / speeds[copy], 4) for name, copy in like.items()}
        yield {"n": n, "k": k, "bytes": moved, "times": times, "fractions": fractions, **device.marks(options)}
        del pairs, dense, weights, columns, operators, alone


def _elementwise_columns(weights: list[tuple[Tensor, Tensor]], dense: list[Tensor]) -> dict[str, Calls]:
    return {
        "dequant to bfloat16": [partial(mxfp8_ops.dequant, *w, torch.bfloat16) for w in weights],
        "dequant to float16": [partial(mxfp8_ops.dequant, *w, torch.float16) for w in weights],
        "quantize from bfloat16": [partial(mxfp8_ops.quantize, each) for each in dense],
    }


def linear(device: Device, options: Options) -> Records:
    """Everything that multiplies, side by side, once for each shape and number of rows."""
    for shape in options.shapes:
        weights = _weights(device, shape, options)
        reads = _fastest_read(device, weights, options)
        emulate = device.compile(emulated_linear) if options.emulated else None
        for m in options.rows:
            x = torch.randn(m, shape[1], dtype=_dtype(options), device=device.place)
            columns = {"R": reads, **_multiplications(weights, x), **device.further(weights, x)}
            if emulate is not None and m in options.emulated:
                columns["emulated"] = [partial(emulated_linear, x, *w.canonical) for w in weights]
                columns["emulated, compiled"] = [partial(emulate, x, *w.canonical) for w in weights]
            samples = device.timer.interleaved(columns, options.replays)
            yield {
                "n": shape[0],
                "k": shape[1],
                "m": m,
                "times": {name: summary(samples[name]) for name in columns},
                "ratios": {
                    name: {unit: ratio(samples[name], samples[unit]) for unit in device.units} for name in columns
                },
                "errors": _errors(weights[0], x),
                **device.marks(options),
            }
            del x, columns
        del weights, reads
        device.release()


def host(device: Device, options: Options) -> Records:
    """Eager host time of a call, with work for the device that takes less."""
    shape = HOST_SHAPE
    weight = device.weight(shape, _dtype(options))
    x = torch.randn(1, shape[1], dtype=_dtype(options), device=device.place)
    calls = {
        "linear_packed": partial(weight.linear_packed, x),
        "linear": partial(mxfp8_ops.linear, x, *weight.canonical),
        "dequant": partial(mxfp8_ops.dequant, *weight.canonical, x.dtype),
        "F.linear": partial(F.linear, x, weight.dense),
    }
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            times = device.timer.host(calls)
        yield {
            "n": shape[0],
            "k": shape[1],
            "m": 1,
            "mode": mode.__name__,
            "us": {n: round(t, 3) for n, t in times.items()},
        }


def cliff(device: Device, options: Options) -> Records:
    """Numbers of rows that take much longer than a neighbour, on the first shape, and whether ``F.linear`` does: one
    record for packed weights, and one for canonical ones.
    """
    shape = options.shapes[0]
    weights = _weights(device, shape, options)
    calls: dict[str, dict[str, Calls]] = {name: {} for name in (*FORMS, "B")}
    for m in options.cliff_rows:
        x = torch.randn(m, shape[1], dtype=_dtype(options), device=device.place)
        multiplications = _multiplications(weights, x)
        for name, columns in calls.items():
            columns[str(m)] = multiplications[name]
    times = {name: _times(device, columns, options) for name, columns in calls.items()}
    for name in FORMS:
        ratios = cliffs({int(m): time["us"] for m, time in times[name].items()})
        of_b = cliffs({int(m): time["us"] / times["B"][m]["us"] for m, time in times[name].items()})
        yield {
            "n": shape[0],
            "k": shape[1],
            "column": name,
            "times": times[name],
            "B": times["B"],
            "ratios": {str(m): round(r, 4) for m, r in ratios.items()},
            "ratios of B": {str(m): round(r, 4) for m, r in of_b.items()},
        }
    device.release()


def sustained(device: Device, options: Options) -> Records:
    """Linears that nothing interrupts, one kind after the other, once for each shape and number of rows: how long a
    call takes once the device has become as warm as it gets, and slows its clock to keep within its power. Side by
    side, in turns, all kinds have the same clock.
    """
    for n, k in options.shapes:
        weights = _weights(device, (n, k), options)
        for m in SUSTAINED_ROWS:
            columns = _multiplications(weights, torch.randn(m, k, dtype=_dtype(options), device=device.place))
            times = {}
            for kind in SUSTAINED:
                us, state = device.timer.sustained(columns[kind], SUSTAINED_SECONDS, device.state)
                times[kind] = {"us": round(us, 4), **state}
            ratios = {kind: round(time["us"] / times["B"]["us"], 4) for kind, time in times.items()}
            yield {"n": n, "k": k, "m": m, "times": times, "ratios": ratios}
        del weights, columns
        device.release()


def emulated_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """What vLLM's emulation computes: the weight dequantized in every call by torch's operators, then ``F.linear``."""
    blocks = weight.to(torch.float32).view(weight.shape[0], -1, 32)
    factors = torch.exp2(scale.to(torch.float32) - 127)
    return F.linear(x, (blocks * factors[:, :, None]).view(weight.shape).to(x.dtype))


# --- weights and columns -------------------------------------------------------------------------------------


def _weights(device: Device, shape: Shape, options: Options) -> list[Weight]:
    return [device.weight(shape, _dtype(options)) for _ in range(device.copies(shape[0] * shape[1]))]


def _dtype(options: Options) -> torch.dtype:
    return getattr(torch, options.dtype)


def _multiplications(weights: list[Weight], x: Tensor) -> dict[str, Sequence[Callable[[], Tensor]]]:
    packed = [weight for weight in weights if weight.packed is not None]
    return {
        "B": [partial(F.linear, x, w.dense) for w in weights],
        **({"packed": [partial(w.linear_packed, x) for w in packed]} if packed else {}),
        "canonical": [partial(mxfp8_ops.linear, x, *w.canonical) for w in weights],
        "folded": [partial(F.linear, x, w.folded) for w in weights],
    }


def _fastest_read(device: Device, weights: list[Weight], options: Options) -> Calls:
    ways = {str(way): [partial(device.read, w.stored, way) for w in weights] for way in device.read_configurations}
    times = _times(device, ways, options)
    return ways[min(times, key=lambda way: times[way]["us"])]


def _times(device: Device, columns: Mapping[str, Calls], options: Options) -> dict[str, dict[str, float]]:
    samples = device.timer.interleaved(columns, options.replays)
    return {name: summary(samples[name]) for name in columns}


def _errors(weight: Weight, x: Tensor) -> dict[str, float]:
    """Relative Frobenius error, each against the float64 product with its own weight."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), ERROR_ROWS), device=x.device).long()
    results = {name: calls[0]()[rows].double() for name, calls in _multiplications([weight], x).items()}
    exact = x[rows].double() @ mxfp8_ops.dequant(*weight.canonical, torch.float32).double().T
    dense = x[rows].double() @ weight.dense.double().T
    expected = {"packed": exact, "canonical": exact, "B": dense}
    return {n: float(f"{(results[n] - e).norm() / e.norm():.3e}") for n, e in expected.items() if n in results}


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: its records, and how many there will be."""

    measure: Callable[[Device, Options], Records]
    count: Callable[[Options], int]


_LINEAR = Section(linear, lambda options: len(options.shapes) * len(options.rows))
SECTIONS = {
    "elementwise": Section(elementwise, lambda options: len(options.shapes)),
    "linear": _LINEAR,
    "host": Section(host, lambda options: 2),
    "cliffs": Section(cliff, lambda options: len(FORMS)),
    "sustained": Section(sustained, lambda options: len(options.shapes) * len(SUSTAINED_ROWS)),
    "bandwidth": Section(bandwidth, lambda options: len(options.shapes) * len(BANDWIDTH_ROWS)),
}
CPU_SECTIONS = {
    "elementwise": Section(elementwise_on_cpu, lambda options: len(options.shapes)),
    "linear": _LINEAR,
}
