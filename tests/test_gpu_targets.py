"""Chips that are not there: what dispatch launches on each of them, recorded and compiled for it. What no compiler can
show, results, is in tests/test_gpu.py for the chip at hand.
"""

# ruff: noqa: E402 (without Triton there is nothing to import, and nothing to test)

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import Launch, compile_for
from triton.backends.compiler import GPUTarget

from lowering import kernels
from mxfp8_ops import gpu, ops, packing
from mxfp8_ops.gpu import dispatch, elementwise
from mxfp8_ops.gpu import launch as launching


@dataclass(frozen=True)
class Chip:
    """What torch says of a device, and what Triton compiles for.

    Attributes:
        shared: bytes of shared memory that a program may have.
    """

    name: str
    capability: tuple[int, int]
    shared: int
    lanes: int = 32

    @property
    def hip(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def has_e4m3(self) -> bool:
        return not self.hip and self.capability >= (8, 9)

    @property
    def target(self) -> GPUTarget:
        if self.hip:
            return GPUTarget("hip", self.name, self.lanes)
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


# gfx90a is (9, 0) to torch, like Hopper.
CHIPS = [
    Chip("sm_80", (8, 0), 163 * 1024),
    Chip("sm_89", (8, 9), 99 * 1024),
    Chip("sm_90", (9, 0), 227 * 1024),
    Chip("sm_100", (10, 0), 227 * 1024),
    Chip("sm_120", (12, 0), 99 * 1024),
    Chip("gfx90a", (9, 0), 64 * 1024, 64),
    Chip("gfx942", (9, 4), 64 * 1024, 64),
    Chip("gfx1100", (11, 0), 64 * 1024),
]
WITHOUT_E4M3 = [chip for chip in CHIPS if not chip.has_e4m3]
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Chip:
    """A chip that dispatch takes every device for."""
    found: Chip = request.param
    monkeypatch.setattr(dispatch, "_gluon", True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: found.capability)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(dispatch, "_processors", lambda device: 132)
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.version, "hip", "7.0" if found.hip else None)
    return found


ON_EVERY_CHIP = pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name, indirect=True)
ON_CHIPS_WITHOUT_E4M3 = pytest.mark.parametrize("chip", WITHOUT_E4M3, ids=lambda chip: chip.name, indirect=True)


def launched(*calls: Callable[[], Any]) -> list[Launch]:
    """What calls of dispatch launch, of which nothing is computed; each kernel once in the same form."""
    recorded: list[Launch] = []

    def record(*args: Any, **options: Any) -> None:
        recorded.append(Launch(*args, **options))

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        for module in users_of_launch():
            patch.setattr(module, "launch", record)
        for call in calls:
            call()
    assert recorded
    return list({form(launch): launch for launch in recorded}.values())


def users_of_launch() -> list[ModuleType]:
    """Every module of kernels: what is imported for the first time while ``launch`` is replaced would keep that."""
    modules = [importlib.import_module(f"{gpu.__name__}.{info.name}") for info in pkgutil.iter_modules(gpu.__path__)]
    return [m for m in modules if m is not launching and getattr(m, "launch", None) is launching.launch]


def form(launch: Launch) -> tuple[Any, ...]:
    return launch.kernel, *map(kind, launch.args), launch.constants, launch.num_warps, launch.maxnreg


def kind(arg: Any) -> Any:
    if isinstance(arg, tuple):  # a TMA descriptor
        return arg[0].dtype, arg[1]
    return arg.dtype if isinstance(arg, Tensor) else (arg == 1, arg % 16 == 0)


N, K = 4096, 4096


def weight_and_scale() -> tuple[Tensor, Tensor]:
    return torch.empty(N, K, dtype=torch.float8_e4m3fn), torch.empty(N, K // 32, dtype=torch.uint8)


def dequant(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: dispatch.dequant(*weight_and_scale(), dtype)


def quantize(dtype: torch.dtype, rule: str) -> Callable[[], Any]:
    return lambda: dispatch.quantize(torch.empty(7, 96, dtype=dtype), rule)


def linear(rows: int, dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: dispatch.linear(torch.empty(rows, K, dtype=dtype), *weight_and_scale(), torch.empty(N, dtype=dtype))


def linear_packed(dtype: torch.dtype) -> Callable[[], Any]:
    packed = torch.empty(packing.packed_shape(N, K), dtype=torch.int32, device="meta")
    return lambda: dispatch.linear_packed(torch.empty(3, K, dtype=dtype), packed, N, None)


ELEMENTWISE = (
    dequant(BFLOAT16),
    dequant(FLOAT16),
    quantize(BFLOAT16, "rceil"),
    quantize(FLOAT32, "floor"),
    linear_packed(FLOAT32),
)
LINEAR = (linear(1, BFLOAT16), linear(2, FLOAT32))
LINEAR_OF_MORE_ROWS = (linear(16, BFLOAT16), linear(64, FLOAT16))


@ON_EVERY_CHIP
def test_kernels_say_whose_they_are_in_a_trace(chip: Chip) -> None:
    names = [launch.kernel.__name__ for launch in launched(*ELEMENTWISE, *LINEAR, *LINEAR_OF_MORE_ROWS)]
    assert {"mxfp8_dequant", "mxfp8_quantize"} < set(names)
    assert [name for name in names if not name.startswith("mxfp8_")] == []


# --- compiled -------------------------------------------------------------------------------------------------------


def compiled(launch: Launch, chip: Chip) -> str:
    """The assembly of a kernel for the chip, on which it can run."""
    found = compile_for(launch, chip.target)
    assert found.metadata.shared <= chip.shared
    assert launch.num_warps * chip.lanes <= 1024
    if chip.hip:
        text: str = found.asm["amdgcn"]
        assert re.search(rf'\.amdgcn_target ".*-{chip.name}"', text)
        assert found.asm["hsaco"]
    else:
        text = found.asm["ptx"]
        assert f".target {chip.name}" in text
        assert found.asm["cubin"]
    return text


def converts_e4m3(text: str) -> bool:
    """Whether assembly has the hardware's conversion, of NVIDIA or of AMD."""
    return "e4m3" in text or "_fp8" in text


@ON_EVERY_CHIP
def test_elementwise_kernels_compile_for_the_chip_and_use_the_conversion_that_it_has(chip: Chip) -> None:
    for launch in launched(*ELEMENTWISE):
        packed = launch.kernel is elementwise.mxfp8_dequant_packed  # whose codes are interleaved
        assert converts_e4m3(compiled(launch, chip)) == (chip.has_e4m3 and not packed)


@ON_EVERY_CHIP
def test_linear_for_a_few_rows_compiles_for_the_chip_and_uses_the_conversion_that_it_has(chip: Chip) -> None:
    for launch in launched(*LINEAR):
        assert converts_e4m3(compiled(launch, chip)) == chip.has_e4m3


@ON_EVERY_CHIP
def test_linear_for_more_rows_runs_on_tensor_cores_where_it_compiles_for_them(chip: Chip) -> None:
    found = launched(*LINEAR_OF_MORE_ROWS)
    if not chip.has_e4m3:
        assert {launch.kernel for launch in found} == {elementwise.mxfp8_dequant}  # what follows is torch's
        return
    assert any("mma" in text for text in [compiled(launch, chip) for launch in found])
    assert elementwise.mxfp8_dequant not in [launch.kernel for launch in found]


@ON_EVERY_CHIP
def test_copies_under_way_have_arrived_before_their_memory_is_used_again(chip: Chip) -> None:
    """Sums go through the shared memory of the stages, into which even copies of nothing write zeros."""
    texts = [compiled(launch, chip) for launch in launched(*LINEAR_OF_MORE_ROWS)]
    staged = [text for text in texts if "cp.async.commit_group" in text]
    assert staged or chip.name not in ("sm_89", "sm_100", "sm_120")
    for text in staged:
        *_, after = re.split(r"cp\.async\.wait_group\s+0;", text)
        assert after != text
        assert "bar.sync" in after[: after.index("st.shared")]
        assert "cp.async.commit_group" not in after[: after.index("st.shared")]


@ON_EVERY_CHIP
def test_partial_sums_are_added_up_by_a_kernel_that_compiles_for_the_chip(chip: Chip) -> None:
    from mxfp8_ops.gpu import mma

    partial, out = torch.empty(4, N, device="meta"), torch.empty(N, dtype=BFLOAT16, device="meta")
    compiled(Launch(mma.mxfp8_add_parts, (1,), (partial, out, out, 64 * N, N), (4, 1024, True)), chip)


# --- what dispatch gives chips that are no Hopper's -----------------------------------------------------------------


@ON_CHIPS_WITHOUT_E4M3
def test_codes_travel_as_bytes_where_triton_has_no_type_for_them(chip: Chip) -> None:
    for launch in launched(*ELEMENTWISE, *LINEAR, *LINEAR_OF_MORE_ROWS, linear_packed(BFLOAT16)):
        assert not any(isinstance(arg, Tensor) and arg.dtype == torch.float8_e4m3fn for arg in launch.args)


@ON_EVERY_CHIP
def test_packed_weights_are_dequantized_with_a_kernel_of_every_chip_but_hopper(chip: Chip) -> None:
    if chip.name == "sm_90":
        assert dispatch._hopper_kernels(torch.device("cuda", 0)) is not None
        return
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        (launch,) = launched(linear_packed(dtype))
        assert launch.kernel is elementwise.mxfp8_dequant_packed
        assert launch.args[1].dtype == dtype


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip.hip], ids=lambda chip: chip.name, indirect=True)
def test_rocm_gets_plain_kernels_with_options_that_it_knows(chip: Chip) -> None:
    """Triton refuses to launch with an option of another backend, like a limit of registers."""
    from triton.backends.amd.compiler import HIPOptions

    assert "num_warps" in HIPOptions.__dataclass_fields__
    assert "maxnreg" not in HIPOptions.__dataclass_fields__
    for launch in launched(*ELEMENTWISE, *LINEAR, *LINEAR_OF_MORE_ROWS, linear_packed(BFLOAT16)):
        assert not launch.kernel.is_gluon()
        assert launch.maxnreg is None


@ON_EVERY_CHIP
def test_inductor_generates_code_for_elements_only_where_triton_has_their_type(chip: Chip) -> None:
    graph = torch.fx.Graph()
    weight, scale = graph.placeholder("weight"), graph.placeholder("scale")
    node = graph.call_function(ops.dequant, (weight, scale, BFLOAT16))
    node.meta["val"] = SimpleNamespace(device=torch.device("cuda", 0))
    assert kernels.lower_dequant(graph) == chip.has_e4m3
    assert (node.target is ops.dequant) != chip.has_e4m3


# --- launching on ROCm ----------------------------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """A tensor in the memory of the host that says it is not."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Calls of the launcher in C of a gfx942 that is not there."""
    from triton.backends.amd import driver as amd
    from triton.runtime.driver import driver

    calls: list[tuple[Any, ...]] = []
    loads = itertools.count(1000)
    utils = SimpleNamespace(
        load_binary=lambda *args: (object(), next(loads), 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 65536},
        build_signature_metadata=lambda signature: tuple(signature),
        launch=lambda *args: calls.append(args),
    )
    device = SimpleNamespace(
        utils=utils,
        launcher_cls=amd.HIPLauncher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("hip", "gfx942", 64),
    )
    monkeypatch.setattr(driver, "_active", device)
    for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):  # from C, where Triton has them
        monkeypatch.setattr(amd, name, SimpleNamespace if name == "PyKernelArg" else name, raising=False)
    launcher = SimpleNamespace(launch=utils.launch)  # where Triton compiles one for every signature
    monkeypatch.setattr(amd, "compile_module_from_src", lambda **_: launcher, raising=False)
    monkeypatch.setattr(amd, "_get_path_to_hip_runtime_dylib", lambda: "libamdhip64.so")
    launching._known.clear()
    elementwise.mxfp8_dequant.device_caches.clear()
    yield calls
    launching._known.clear()
    elementwise.mxfp8_dequant.device_caches.clear()


@pytest.mark.parametrize("nvidia", [True, False], ids=["with the code for NVIDIA", "without the code for NVIDIA"])
def test_every_launch_on_rocm_is_tritons_own(
    rocm: list[tuple[Any, ...]], nvidia: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of Triton for ROCm need not have NVIDIA's driver. What Triton specialises there, launch.py's keys do not
    hold: a tensor of less than 2 GiB is addressed otherwise.
    """
    if not nvidia:
        monkeypatch.setitem(sys.modules, "triton.backends.nvidia.driver", None)
    codes, scales = (torch.zeros(size, dtype=torch.uint8).as_subclass(OnDevice) for size in (64, 2))
    out = torch.zeros(64, dtype=BFLOAT16).as_subclass(OnDevice)
    for count in (1, 2, 3):
        launching.launch(elementwise.mxfp8_dequant, (1,), (codes, scales, out, 2), (False, 32, 64), 4)
        assert len(rocm) == count
    assert not launching._known
