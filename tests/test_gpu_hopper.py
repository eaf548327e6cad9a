"""The kernels for Hopper on tiles, on packed and on canonical weights, without such a chip: compiled for one; and what
becomes of weights where they cannot be had. Results on the chip itself are in tests/test_gpu_packed*.py.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor

import mxfp8_ops
from mxfp8_ops import packing, reference

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

import triton
from compiling import (
    SHARED,
    Compiled,
    check_fits,
    check_innermost_loop,
    check_loads,
    check_loops,
    check_waits,
    check_warp_sums,
    compiled,
    compiled_at_an_end,
    launches,
    one_tile,
    tiled_kernels,
)
from simulating import DTYPE, DTYPES

from mxfp8_ops.gpu import dispatch, plans, plans_few
from mxfp8_ops.gpu.counts import REGISTERS


@DTYPE
@pytest.mark.parametrize("kernel", plans_few.NARROW, ids=repr)
def test_narrow_compiles_and_as_many_run_at_once_as_the_model_counts(
    kernel: plans_few.Narrow, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = compiled_at_an_end(kernel, True, dtype, tmp_path)
    assert found.spilled == 0
    check_fits(found, kernel.at_once)
    assert "ld.shared.v4" in found.ptx
    assert "ldmatrix" in found.ptx
    check_waits(found)
    check_loads(found)
    check_warp_sums(found.ptx, kernel.warps)
    if kernel.warps > 1:
        check_start(found)


def in_turns(packed: bool) -> list[tuple[plans.Tiled, torch.dtype]]:
    """Every kernel in one dtype, and in the other one for weights of the other form: they take long to compile."""
    kinds = list(plans.TABLE)
    found = []
    for kernel in tiled_kernels(packed):
        turn = kinds.index(plans._kind(kernel)) if isinstance(kernel, plans.Skinny) else len(kinds)
        found.append((kernel, DTYPES[(turn + packed) % 2]))
    return found


@pytest.mark.parametrize(("kernel", "dtype"), in_turns(packed=True), ids=repr)
def test_kernels_on_packed_weights_compile_and_fit_a_multiprocessor(
    kernel: plans.Tiled, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = compiled_at_an_end(kernel, True, dtype, tmp_path)
    check_tiled(kernel, found, tmp_path)
    if isinstance(kernel, plans.Skinny):
        assert "ld.shared.v4" in found.ptx
        assert found.spilled <= 32
        check_loops(tmp_path, 0, 1)
    else:
        check_innermost_loop(tmp_path)
        check_loops(tmp_path, *((2, 2) if kernel.rows > 256 else (0, 2)))  # between tiles


@pytest.mark.parametrize(("kernel", "dtype"), in_turns(packed=False), ids=repr)
def test_kernels_on_canonical_weights_compile_without_a_spill_and_fit_a_multiprocessor(
    kernel: plans.Tiled, dtype: torch.dtype, tmp_path: Path
) -> None:
    """But for the highest tile, between tiles."""
    found = compiled_at_an_end(kernel, False, dtype, tmp_path)
    check_tiled(kernel, found, tmp_path)
    if kernel.rows > 256:
        check_innermost_loop(tmp_path)
        check_loops(tmp_path, 9, 9)
    else:
        assert found.spilled == 0
        check_loops(tmp_path, 0, 0)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
@pytest.mark.parametrize("rows", plans.WIDE)
def test_the_warps_that_multiply_tiles_of_wide_have_nearly_all_registers(
    rows: int, packed: bool, tmp_path: Path
) -> None:
    """Eight warps have 240 for each lane, and what is left is enough for the one that loads."""
    found = compiled(plans.Wide(132, rows=rows), packed, 4096, torch.bfloat16, False, tmp_path)
    numbers = re.findall(r"setmaxnreg\.inc\S+\s+(\d+)", found.ptx)
    assert max(map(int, numbers)) == 240
    assert 240 * 8 * 32 + min(map(int, numbers)) * 4 * 32 <= REGISTERS


def check_tiled(kernel: plans.Tiled, found: Compiled, folder: Path) -> None:
    """That as many programs run at once as the model counts on, and matrix instructions do not wait for each other."""
    check_fits(found, plans.TABLE[plans._kind(kernel)].at_once if isinstance(kernel, plans.Skinny) else 1)
    assert "serialized" not in found.log, found.log
    check_waits(found)
    check_loads(found)
    check_sums(found)
    check_start(found)


def check_start(found: Compiled) -> None:
    """That the first stage is on its way before the warp that loads has begun."""
    assert found.ttgir.index("async_tma_copy_global_to_local") < found.ttgir.index("ttg.warp_specialize")


def check_sums(found: Compiled) -> None:
    """That all warps have stored their sums before one says so, and that who adds them reads them where they are, after
    it was said to one of its warps.
    """
    said = re.split(r"atom\.global\.gpu\.release\.exch\.b64", found.ptx)
    heard = re.split(r"ld\.acquire\.gpu\.global\.b64", found.ptx)
    assert min(len(said), len(heard)) > 1
    for before in said[:-1]:
        assert before.rindex("bar.sync") > before.rindex("st.global.v4.b32")
    for after in heard[1:]:
        assert after.index("bar.sync") < after.index("ld.global.cg.v4.b32")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
@pytest.mark.parametrize("m", [1, 16, 200])
def test_a_weight_of_one_row_compiles(m: int, packed: bool, tmp_path: Path) -> None:
    """Triton makes a constant of an N that is 1."""
    plan = one_tile(plans.plan(m, 1, 4096, 132, packed))
    assert compiled(plan, packed, 1, torch.bfloat16, True, tmp_path).shared <= SHARED


# --- where the kernels cannot be had --------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that dispatch takes for a Hopper chip, whose fallback is computed on the CPU."""
    monkeypatch.setattr(dispatch, "_gluon", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        dispatch.elementwise,
        "dequant_packed",
        lambda packed, n, k, dtype: reference.dequant(*packing.unpack(packed, n, k), dtype),
    )
    return torch.device("cpu")


def without_kernels(monkeypatch: pytest.MonkeyPatch, instead: Any) -> None:
    monkeypatch.setitem(sys.modules, "mxfp8_ops.gpu.hopper", instead)
    monkeypatch.delattr("mxfp8_ops.gpu.hopper", raising=False)
    if instead is not None:
        monkeypatch.setattr("mxfp8_ops.gpu.hopper", instead, raising=False)


def test_a_triton_without_gluon_is_one_warning_and_no_kernels(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernels(monkeypatch, None)
    with pytest.warns(UserWarning, match="kernels in Gluon fail"):
        assert dispatch._hopper_kernels(hopper) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._hopper_kernels(hopper) is None


@pytest.mark.parametrize(
    "error", [triton.errors.TritonError("no such instruction"), RuntimeError("PassManager::run failed")]
)
def test_kernels_that_do_not_compile_are_one_warning_and_right_answers(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = []

    def linear(*args: Any) -> None:
        calls.append(args)
        raise error

    without_kernels(monkeypatch, SimpleNamespace(linear_packed=linear))
    x, weight, scale, bias = exact_linear_inputs(3, 33, 288, torch.bfloat16)
    packed, expected = mxfp8_ops.pack(weight, scale), reference.linear(x, weight, scale, bias)
    with pytest.warns(UserWarning, match=str(error)):
        assert_same(dispatch.linear_packed(x, packed, 33, bias), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(dispatch.linear_packed(x, packed, 33, bias), expected)
    assert len(calls) == 1


def test_other_errors_of_the_kernels_are_raised_and_change_nothing(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def linear(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    kernels = SimpleNamespace(linear_packed=linear)
    without_kernels(monkeypatch, kernels)
    x, weight, scale, bias = exact_linear_inputs(3, 33, 288, torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.linear_packed(x, mxfp8_ops.pack(weight, scale), 33, bias)
    assert dispatch._hopper_kernels(hopper) is kernels


def test_kernels_are_for_hopper_alone(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch._hopper_kernels(hopper) is not None
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(dispatch, "_capability", lambda device, capability=capability: capability)
        assert dispatch._hopper_kernels(hopper) is None


def test_a_strided_bias_reaches_the_kernels_in_order(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the bias for contiguous."""
    given: list[Tensor] = []

    def linear(x: Tensor, packed: Tensor, n: int, bias: Tensor) -> Tensor:
        given.append(bias)
        return x.new_empty(len(x), n)

    without_kernels(monkeypatch, SimpleNamespace(linear_packed=linear))
    x, weight, scale, bias = exact_linear_inputs(3, 33, 288, torch.bfloat16)
    dispatch.linear_packed(x, mxfp8_ops.pack(weight, scale), 33, torch.stack([bias, bias + 1], -1)[:, 0])
    assert given[0].is_contiguous()
    assert_same(given[0], bias)


@pytest.mark.parametrize(
    ("m", "k", "name"),
    [
        (8, 256, "vectors"),
        (8, 288, "vectors"),
        (9, 256, "hopper"),
        (64, 256, "hopper"),
        (6144, 256, "hopper"),
        (6145, 256, None),
        (16, 288, "vectors"),
        (17, 288, "mma"),
        (64, 288, "mma"),
        (65, 288, None),
    ],
)
def test_canonical_weights_of_whole_blocks_reach_the_kernels_from_nine_rows_on(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, m: int, k: int, name: str | None
) -> None:
    called: list[tuple[str, tuple[Tensor, ...]]] = []

    def kernels(name: str) -> Any:
        def linear(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
            called.append((name, (x, weight, *args[:2])))
            return x.new_ones(len(x), len(weight))

        return SimpleNamespace(linear=linear, plan=lambda *args: None)

    monkeypatch.setattr(dispatch, "_gluon_kernels", kernels)
    monkeypatch.setattr(dispatch, "_processors", lambda device: 132)
    monkeypatch.setattr(dispatch, "dequant", lambda weight, scale, dtype: reference.dequant(weight, scale, dtype))
    x, weight, scale, bias = exact_linear_inputs(m, 33, k, torch.bfloat16)
    strided = torch.stack([x, x], -1)[..., 0], weight.T.contiguous().T, scale, torch.stack([bias, bias], -1)[:, 0]
    actual = dispatch.linear(*strided)
    assert [found for found, _ in called] == ([] if name is None else [name])
    for _, given in called:
        for one, other in zip(given, (x, weight, scale, bias), strict=True):
            assert one.is_contiguous()
            assert one.data_ptr() % 16 == 0
            assert_same(one, other)
    if name is None:
        assert_same(actual, reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize(
    ("capability", "by_float32"), [((8, 9), True), ((9, 0), False), ((10, 0), False), ((12, 0), False)]
)
def test_two_rows_are_decoded_as_the_chip_can(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], by_float32: bool
) -> None:
    given = []

    def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *further: Any) -> Tensor:
        given.append(further)
        return x.new_ones(len(x), len(weight))

    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_gluon_kernels", lambda name: SimpleNamespace(linear=linear))
    monkeypatch.setattr(dispatch, "_processors", lambda device: 100)
    x, weight, scale, _ = exact_linear_inputs(2, 33, 128, torch.bfloat16)
    dispatch.linear(x, weight, scale, None)
    assert given == [(100, by_float32)]


@pytest.mark.parametrize(("m", "k"), [(64, 32), (65, 32), (300, 128)])
def test_packed_weights_reach_the_kernels_with_any_number_of_rows(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, m: int, k: int
) -> None:
    """With more than those from which on canonical weights are dequantized first, too."""
    called = []
    monkeypatch.setattr(dispatch, "_MOST_ROWS", 64)

    def linear(x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
        called.append(len(x))
        return reference.linear(x, *packing.unpack(packed, n, k), bias)

    without_kernels(monkeypatch, SimpleNamespace(linear_packed=linear))
    x, weight, scale, bias = exact_linear_inputs(m, 3, k, torch.bfloat16)
    assert_same(
        dispatch.linear_packed(x, packing.pack(weight, scale), 3, bias), reference.linear(x, weight, scale, bias)
    )
    assert called == [m]


@pytest.mark.parametrize("word", [None, "0", "1"])
def test_launches_are_dependent_only_where_the_variable_says_so(
    monkeypatch: pytest.MonkeyPatch, word: str | None
) -> None:
    if word is not None:
        monkeypatch.setenv("MXFP8_DEPENDENT_LAUNCH", word)
    for m in (1, 8, 16, 64, 300):
        first, *more = launches(plans.plan(m, 1024, 4096, 132), m, 1024, 4096)
        assert first.dependent == (word == "1")
        assert not any(launch.dependent for launch in more)  # they add up parts, and do not wait by themselves
