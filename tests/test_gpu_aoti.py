"""Packages of AOTInductor on a CUDA device, where neither this package nor Triton can be imported.

A compiler that puts the C++ library into what it links makes packages whose loading ends the process, with or without
MXFP8: ``CXX`` can name another.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, exact_linear_inputs

import lowering
from mxfp8_ops import Mxfp8Linear, reference

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("how", [{"fused": True}, {"dequant_at_load": False}, {"dequant_at_load": True}], ids=str)
def test_a_package_gives_the_bits_of_the_reference(how: dict[str, Any], tmp_path: Path) -> None:
    x, weight, scale, bias = exact_linear_inputs(70, 96, 288, torch.bfloat16)
    layer = Mxfp8Linear.from_quantized(weight, scale, bias).cuda()
    batch = torch.export.Dim("batch", min=2, max=256)
    package = lowering.aoti_package(layer, (x.cuda(),), tmp_path / "layer.pt2", dynamic_shapes=({0: batch},), **how)
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    torch.save([(x[:5].cuda(),), (x.cuda(),)], inputs)
    program = Path(__file__).with_name("without.py")
    command = [sys.executable, str(program), str(package), str(inputs), str(outputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = torch.load(outputs)[0]
    expected = reference.linear(x, weight, scale, bias)
    assert_same(few.cpu(), expected[:5])
    assert_same(many.cpu(), expected)
