"""Packages of AOTInductor: what is in them, and what they give where this package cannot be imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import all_codes, assert_same
from models import Chain, layer, rows
from torch import Tensor, nn
from torch._inductor import config

import lowering
import mxfp8_ops
from lowering import compat

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler"
)
needs_e4m3 = pytest.mark.skipif(
    not compat.packages_e4m3_on_cpu(), reason="AOTInductor of this torch cannot compile float8 for the CPU"
)
FAST = {"aot_inductor.compile_wrapper_opt_level": "O0"}
SIDE = 3072


class Model(nn.Module):
    """Two linears, rows of every code times every scale, and a large weight beside a large one that is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        weight, scale = all_codes()
        self.register_buffer("codes", weight)
        self.register_buffer("code_scale", scale)
        self.large = layer(SIDE, SIDE, bias=False)
        self.dense = nn.Linear(32, 32, dtype=torch.bfloat16)
        for parameter in self.dense.parameters():  # sums of which are exact in any order
            nn.init.constant_(parameter, 3)

    def forward(self, x: Tensor, index: Tensor, wide: Tensor) -> list[Tensor]:
        chain = self.chain(x)
        dense = self.dense((chain > 0).to(x.dtype))
        codes = mxfp8_ops.dequant(self.codes, self.code_scale, torch.bfloat16)
        return [chain, dense, codes[index], self.large(wide)]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def call(m: int) -> tuple[Tensor, Tensor, Tensor]:
    return rows(m), torch.arange(256), rows(2, SIDE)


BATCH = torch.export.Dim("batch", min=2, max=64)
DYNAMIC = {"x": {0: BATCH}, "index": None, "wide": None}


@dataclass(frozen=True)
class Package:
    """A package, the flag it was made under, and the settings of Inductor before and after."""

    path: Path
    on: bool
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def source(self) -> str:
        with zipfile.ZipFile(self.path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
            return archive.read(name).decode()

    def constants(self, folded: bool) -> dict[str, tuple[str, int]]:
        """Dtype and bytes, in multiples of 64, of what the package holds, or of what it computes when it is loaded."""
        found: dict[str, dict[str, str]] = {}
        for number, field, value in re.findall(r"constants_info_\[(\d+)\]\.(\w+) = (.*);", self.source):
            found.setdefault(number, {})[field] = value.strip('"').removeprefix("cached_torch_dtype_")
        own = [each for each in found.values() if (each["from_folded"] == "true") == folded]
        return {each["original_fqn"] or each["name"]: (each["dtype"], int(each["data_size"])) for each in own}


@pytest.fixture(scope="module", params=[False, True], ids=["unset", "on"])
def package(request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """One under the flag of the environment, one without a flag where all else would fold: freezing, and enable()."""
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), config.patch(freezing=not request.param):
        if request.param:
            patch.setenv("MXFP8_DEQUANT_AT_LOAD", "on")
        else:
            lowering.enable(dequant_at_load=True)
        before = config.get_config_copy()
        made = lowering.aoti_package(model, call(5), path, dynamic_shapes=DYNAMIC, options=FAST)
        lowering.disable()
        assert made == path
        return Package(path, request.param, before, config.get_config_copy())


def run_without(package: Package, calls: list[Any], folder: Path, **constants: Tensor) -> tuple[list[Any], list[str]]:
    """Outputs of calls in a process that cannot import this package, and names of constants: see ``without.py``."""
    files = [package.path, folder / "inputs", folder / "outputs"]
    torch.save(calls, files[1])
    if constants:
        files.append(folder / "constants")
        torch.save(constants, files[3])
    program = [sys.executable, str(Path(__file__).parent / "without.py")]
    done = subprocess.run([*program, *map(str, files)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(files[2])


@needs_compiler
@needs_e4m3
def test_package_gives_the_bits_of_eager_where_this_package_cannot_be_imported(
    package: Package, model: Model, tmp_path: Path
) -> None:
    sizes = (2, 5, 33)
    results, _ = run_without(package, [call(m) for m in sizes], tmp_path)
    for m, actual in zip(sizes, results, strict=True):
        for one, expected in zip(actual, model(*call(m)), strict=True):
            assert_same(one, expected.detach())


@needs_compiler
@needs_e4m3
def test_weights_in_the_package_are_the_bytes_of_the_model(package: Package, model: Model) -> None:
    names = {torch.float8_e4m3fn: "float8_e4m3fn", torch.uint8: "uint8", torch.bfloat16: "bfloat16"}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert package.constants(folded=False) == {
        name: (names[tensor.dtype], tensor.nbytes) for name, tensor in tensors.items()
    }
    fixed = 4 * 2**20  # of any package: code and its debugging information
    assert package.path.stat().st_size < fixed + sum(tensor.nbytes for tensor in tensors.values()) < 1.6 * SIDE**2


@needs_compiler
@needs_e4m3
def test_with_the_flag_on_only_weights_are_computed_when_loaded_and_in_the_dtype_of_x(
    package: Package, model: Model
) -> None:
    sizes = sorted(2 * weight.numel() for weight in (model.chain.up.weight, model.chain.down.weight, model.codes))
    expected = [("bfloat16", size) for size in [*sizes, 2 * SIDE**2]] if package.on else []
    assert sorted(package.constants(folded=True).values(), key=lambda each: each[1]) == expected


@needs_compiler
@needs_e4m3
def test_weights_are_dequantized_in_the_first_call_with_the_flag_on_and_else_in_every_call(
    package: Package, model: Model, tmp_path: Path
) -> None:
    constants = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    (first, second, third), names = run_without(package, [call(5)], tmp_path, **constants)
    assert set(constants) <= set(names)
    raised = Model()
    raised.load_state_dict({name: t + 1 if name.endswith("scale") else t for name, t in constants.items()})
    before, after = model(*call(5)), raised(*call(5))
    for actual, expected in ((first, before), (second, before if package.on else after), (third, after)):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other.detach())


@needs_compiler
@needs_e4m3
def test_settings_of_inductor_are_as_before(package: Package) -> None:
    assert package.before == package.after


class Writing(nn.Module):
    """Writes to a tensor that was dequantized from the weight of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layer(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own = mxfp8_ops.dequant(self.inner.weight, self.inner.weight_scale)
        own.mul_(2)
        return x @ own.t(), self.inner(x)


def test_a_dequantized_tensor_that_is_written_to_is_nobody_elses(tmp_path: Path) -> None:
    model = Writing()
    path = lowering.aoti_package(model, (rows(),), tmp_path / "model.pt2", dequant_at_load=True)
    loaded = torch._inductor.aoti_load_package(str(path))
    for _ in range(2):
        for actual, expected in zip(loaded(rows()), model(rows()), strict=True):
            assert_same(actual, expected)
