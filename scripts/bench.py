"""Speed on a CUDA device, as ratios measured side by side: of dequant and quantize to a copy of as many bytes, of
linear to a kernel that only reads the packed bytes (R) and to bfloat16 ``F.linear`` (B).

Every figure is the median over replays of one CUDA graph, which calls the kernel on weights that together are
larger than any cache. Prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import mxfp8_ops

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672), (1024, 4096))
ROWS = (1, 2, 4, 8, 64, 256, 2048)
ROTATED_BYTES = 300 << 20
REPLAYS = 9


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="rows of x")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench: there is no CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, ", end="")
    print(f"{datetime.date.today()}, `python scripts/bench.py --device {args.device}`\n")
    elementwise_table()
    linear_table(args.rows)
    return 0


def elementwise_table() -> None:
    print("| N x K | dequant to bfloat16 | to float16 | quantize from bfloat16 |\n|---|---|---|---|")
    for n, k in SHAPES[:6]:
        packed = [random_weight(n, k) for _ in range(copies(3 * n * k))]
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in packed]
        moved = n * k * 3 + n * k // 32
        copy = copy_seconds(moved)
        cells = [
            copy / seconds([lambda p=p, d=dtype: mxfp8_ops.dequant(*p, d) for p in packed])
            for dtype in (torch.bfloat16, torch.float16)
        ]
        cells.append(copy / seconds([lambda x=x: mxfp8_ops.quantize(x) for x in dense]))
        print(f"| {n} x {k} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |", flush=True)


def linear_table(rows: Sequence[int]) -> None:
    print("\nus for R, then linear as a multiple of R and of B\n")
    print("| N x K | R | " + " | ".join(f"M={m}" for m in rows) + " |\n|---|---|" + "---|" * len(rows))
    for n, k in SHAPES:
        packed = [random_weight(n, k) for _ in range(copies(n * k))]
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in packed[: len(packed) // 2 + 1]]
        read = min(
            seconds([lambda w=w, c=c: read_only(*w, *c) for w in packed]) for c in ((2048, 4), (4096, 2), (1024, 4))
        )
        cells = []
        for m in rows:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            ours = seconds([lambda p=p, x=x: mxfp8_ops.linear(x, *p) for p in packed])
            theirs = seconds([lambda w=w, x=x: F.linear(x, w) for w in dense])
            cells.append(f"{ours / read:.2f} R, {ours / theirs:.2f} B")
        print(f"| {n} x {k} | {read * 1e6:.2f} | " + " | ".join(cells) + " |", flush=True)


def random_weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight and its scale, of ordinary codes, one behind the other in memory."""
    both = torch.randint(0, 120, (n * k + n * k // 32,), dtype=torch.uint8, device="cuda")
    weight, scale = both.split([n * k, n * k // 32])
    return weight.view(torch.float8_e4m3fn).view(n, k), scale.clamp_(min=110).view(n, k // 32)


def copies(size: int) -> int:
    """How many weights of ``size`` bytes are more than the caches hold."""
    return max(3, ROTATED_BYTES // size + 1)


def copy_seconds(moved: int) -> float:
    """Time to copy so that ``moved`` bytes are read and written together, out of the caches."""
    pairs = torch.empty(copies(moved), 2, moved // 2, dtype=torch.uint8, device="cuda")
    return seconds([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs])


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Time of one call, from replays of a CUDA graph of them all."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def read_only(weight: Tensor, scale: Tensor, elements: int, steps: int) -> None:
    """Reads the bytes of a weight and of its scale behind it, and does next to nothing with them."""
    words = weight.view(torch.int32)
    count = (weight.nbytes + scale.nbytes) // 4
    grid = (triton.cdiv(count, elements * steps),)
    _read_kernel[grid](words, count, ELEMENTS=elements, STEPS=steps, num_warps=elements // 512)


@triton.jit
def _read_kernel(words, count, ELEMENTS: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * ELEMENTS * STEPS
    offset = start + tl.arange(0, ELEMENTS)
    total = tl.zeros((ELEMENTS,), tl.int32)
    for step in tl.static_range(STEPS):
        at = offset + step * ELEMENTS
        total ^= tl.load(words + at, mask=at < count, other=0, eviction_policy="evict_first")
    result = tl.sum(total, 0)
    if result == 0x12345678:  # the compiler must believe that somebody wants to know
        tl.store(words + start, result)


if __name__ == "__main__":
    sys.exit(main())
