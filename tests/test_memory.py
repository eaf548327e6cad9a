"""Large pages for what is read again and again on a CPU, and no harm to what lies beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mxfp8_ops
from mxfp8_ops import Mxfp8Linear, memory, reference
from mxfp8_ops.checkpoint import open_checkpoint

needs_large_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with large pages"
)
BYTES = 1 << 25
"""More than the C library ever takes from memory that was freed."""


def asks_for_large_pages(tensor: Tensor) -> bool:
    """Whether Linux was told to make the mapping in whose middle a tensor lies of large pages, where it has them."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping at {address:#x}")


@needs_large_pages
def test_large_results_are_written_to_large_pages() -> None:
    dense = torch.randn(BYTES, dtype=torch.bfloat16).view(-1, 64)
    weight, scale = mxfp8_ops.quantize(dense)
    values = mxfp8_ops.dequant(weight, scale, torch.bfloat16)
    product = mxfp8_ops.linear(dense[: 1 << 12], *mxfp8_ops.quantize(torch.randn(8192, 64).bfloat16()))
    for result in (weight, values, product):
        assert result.nbytes >= BYTES
        assert asks_for_large_pages(result)
        assert not asks_for_large_pages(dense)
    assert_same(values, reference.dequant(weight, scale, torch.bfloat16))


@needs_large_pages
def test_large_weights_lie_in_large_pages_wherever_they_come_from(tmp_path: Path) -> None:
    layer = Mxfp8Linear(8192, BYTES // 8192)
    assert asks_for_large_pages(layer.weight)
    assert layer.weight.view(torch.uint8).count_nonzero() == 0
    codes = torch.randint(0, 127, (BYTES // 8192, 8192), dtype=torch.uint8)
    save_file({"codes": codes}, tmp_path / "model.safetensors")
    read = open_checkpoint(tmp_path / "model.safetensors").files.read("codes")
    assert asks_for_large_pages(read)
    assert torch.equal(read, codes)


def test_asking_for_pages_changes_nothing_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    there = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8)
    before = there.clone()
    for first, size in ((0, 3 << 20), (1, 4095), (4097, 0), (5000, 1 << 20)):
        part = there[first : first + size]
        assert memory.in_large_pages(part) is part
        assert torch.equal(there, before)


def test_tensors_without_memory_of_a_cpu_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(memory, "_madvise", lambda *arguments: asked.append(arguments))
    with FakeTensorMode():
        fake = torch.empty(BYTES, dtype=torch.uint8)
    for tensor in (fake, torch.empty(BYTES, dtype=torch.uint8, device="meta")):
        assert memory.in_large_pages(tensor) is tensor
    assert asked == []
