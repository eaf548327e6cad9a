"""Loads a checkpoint in a process of its own: as one of several ranks, or measuring how much memory it takes.

``python loading_worker.py ranks FOLDER RANK RANKS`` writes ``FOLDER/RANK.pt``, what the rank's model computes;
``python loading_worker.py memory CHECKPOINT KIND`` prints the bytes of the model and the most that loading took.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mxfp8_ops
from mxfp8_ops.checkpoint import TensorParallel, load_into, open_checkpoint

PLAN = {"block.*_proj": "colwise", "block.down": "rowwise", "block.wide": "colwise", "block.narrow": "rowwise"}
N, K, LAYERS = 4096, 4096, 6


class Block(nn.Module):
    """Two linears in a row twice, MXFP8 ones and plain ones; between them every value becomes 0 or 1."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(64, 128, device="meta")
        self.down = nn.Linear(64, 64, device="meta")
        self.wide = nn.Linear(64, 32, device="meta")
        self.narrow = nn.Linear(32, 64, device="meta")
        self.norm = nn.LayerNorm(64, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        y = self.down(((gate > 0) & (up > -8)).to(x.dtype))
        z = self.narrow((self.wide(x) > 0).to(x.dtype))
        return torch.cat([gate.sum(-1, keepdim=True), y, z], -1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()


def ranks(folder: Path, rank: int, count: int) -> None:
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    model = Model()
    load_into(model, open_checkpoint(folder / "checkpoint"), parallel=TensorParallel(PLAN))
    x = torch.load(folder / "x.pt")
    compiled = torch.compile(model.block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = {"eager": model.block(x), "compiled": compiled(x)}
    torch.save(
        found | {name: tensor.view(torch.uint8) for name, tensor in model.state_dict().items()}, folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


def memory(path: Path, kind: str) -> None:
    """``kind``: kept, dequantized, or naive, which reads whole files."""
    model = nn.Sequential(*(nn.Linear(K, N, bias=False, device="meta") for _ in range(LAYERS)))
    checkpoint = open_checkpoint(path)
    mxfp8_ops.dequant(*mxfp8_ops.quantize(torch.zeros(1024, 1024)))  # threads and kernels are there before it counts
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = _status("VmRSS")
    if kind == "naive":
        from safetensors.torch import load_file

        everything = [tensor.clone() for file in checkpoint.files.paths for tensor in load_file(file).values()]
        assert everything
    load_into(model, checkpoint, dequant_at_load=kind == "dequantized", progress=False)
    print(sum(tensor.nbytes for tensor in model.state_dict().values()), _status("VmHWM") - before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1] == "ranks":
        ranks(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        memory(Path(sys.argv[2]), sys.argv[3])
