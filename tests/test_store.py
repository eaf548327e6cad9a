"""Dequantized weights live as long as somebody needs them, and no longer."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from models import folding, layer, rows

from lowering import Options, backend, report, store
from lowering.forms import Dequantized
from mxfp8_ops import dequant

ON = {"dequant_at_load": True}


def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def make(packed: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> store.Entry:
    return store.entry((packed.weight, packed.weight_scale), (identity, identity), "", Dequantized(dtype))


def test_one_entry_for_a_weight_a_scale_and_a_dtype() -> None:
    packed = layer()
    first = make(packed)
    assert make(packed) is first
    assert make(packed, torch.float32) is not first
    packed.weight_scale = packed.weight_scale.clone()
    assert make(packed) is not first


def test_value_goes_with_its_weight_though_the_graph_stays() -> None:
    packed = layer()
    entry = make(packed)
    value = weakref.ref(entry.value)
    del packed
    gc.collect()
    assert value() is None
    assert entry.value is None


def test_value_goes_with_its_graphs_though_the_weight_stays() -> None:
    packed = layer()
    compiled = torch.compile(packed, backend=folding(**ON), fullgraph=True)
    compiled(rows())
    value = weakref.ref(make(packed).value)
    assert value() is not None
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert value() is None


def test_reports_keep_no_weight_alive() -> None:
    packed = layer()
    weight = weakref.ref(packed.weight)
    with report.collect() as graphs, torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.compile(packed, backend="mxfp8", options=ON)(rows())
    del packed
    torch._dynamo.reset()
    gc.collect()
    assert graphs[0].weights[0].action == "folded"
    assert weight() is None


def test_entry_of_a_dead_weight_is_not_mistaken_for_a_new_one_at_its_address() -> None:
    for seed in range(50):
        packed = layer(seed=seed)
        assert torch.equal(make(packed).value, dequant(packed.weight, packed.weight_scale))


def test_entry_made_in_inference_mode_can_be_saved_for_backward() -> None:
    packed = layer()
    with torch.inference_mode():
        entry = make(packed)
    assert not entry.value.is_inference()


def test_expired_entry_is_made_again_in_place() -> None:
    packed = layer()
    entry = make(packed)
    address = entry.value.data_ptr()
    packed.weight.data.zero_()
    store.expire([packed.weight])
    assert not entry.is_current((packed.weight, packed.weight_scale))
    assert make(packed) is entry
    assert entry.value.data_ptr() == address
    assert not entry.value.any()


PEAK = """
import gc, re, torch, mxfp8_ops
from lowering.backend import Options, lower
from torch import nn
N, LAYERS = 4096, 8
def packed():
    bytes = torch.full((N, N), 0x38, dtype=torch.uint8)
    return mxfp8_ops.Mxfp8Linear.from_quantized(
        bytes.view(torch.float8_e4m3fn), torch.full((N, N // 32), 127, dtype=torch.uint8))
def run(model, release):
    def compile_graph(gm, inputs):
        return lower(gm, inputs, Options(True, release), {}, lambda gm, inputs, config_patches: gm.forward)
    torch.compile(model, backend=compile_graph)(x)
    torch._dynamo.reset()
    gc.collect()
def peak():
    # Not getrusage, whose maximum a child may inherit from a large parent.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
x = torch.ones(1, N, dtype=torch.bfloat16)
small = nn.Sequential(mxfp8_ops.Mxfp8Linear.from_float(torch.eye(N)[:32]))
run(small, False)  # everything imported, every thread started
before = peak()
for release in (True, False):  # the second one needs more
    run(nn.Sequential(*[packed() for _ in range(LAYERS)]), release)
    print((peak() - before) / (2 * N * N))  # in dense layers
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory_of_the_fold_is_what_stays_plus_one_layer() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    slack = 1.5  # scales, threads, what the allocator holds back: some 50 MB
    released, kept = map(float, done.stdout.split())
    assert released <= 8 + 1 + slack
    assert kept <= 8 * 1.5 + 1 + slack


def test_nothing_of_a_call_outlives_its_compile() -> None:
    graphs: list[tuple[torch.fx.GraphModule, list[torch.Tensor]]] = []

    def keep(gm: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> object:
        graphs.append((gm, [each.detach().clone() for each in inputs]))
        return gm.forward

    torch.compile(layer(), backend=keep, fullgraph=True)(rows())
    gm, inputs = graphs.pop()
    refs = [weakref.ref(each) for each in inputs]
    gc.collect()
    gc.disable()
    try:
        backend.lower(gm, inputs, Options(dequant_at_load=False), {}, lambda copy, inputs, patches: copy.forward)
        del inputs
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()
