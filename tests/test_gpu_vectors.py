"""The kernel for two to 16 rows of x on a weight as it is stored, without a chip: compiled, and simulated on the CPU.
Results on a chip are in tests/test_gpu.py and test_gpu_vectors_on_chip.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor

from mxfp8_ops import reference

pytest.importorskip("triton.experimental.gluon")

from compiling import (
    DTYPES,
    Launch,
    check_warp_sums,
    compile_for,
    compile_for_hopper,
    launches,
    one_code_a_row,
    what_codes_mean,
)
from simulating import DTYPE, GLUON, Pointer, in_python
from triton.backends.compiler import GPUTarget

from mxfp8_ops.gpu import fragments, mma_layouts, plans_vectors, scaled_codes, vectors
from mxfp8_ops.gpu import places as numbers
from mxfp8_ops.gpu.kinds_few import Vectors

KINDS = [*plans_vectors.COSTS]


# --- compiled -------------------------------------------------------------------------------------------------------


def loops(ptx: str) -> list[str]:
    """Those that multiply."""
    blocks = re.split(r"\n(?=\$L__BB0_\d+:)", ptx)
    found = [block for block in blocks if "mma.sync" in block]
    assert all(re.search(rf"bra\S*\s+{re.escape(block.partition(':')[0])};", block) for block in found)
    return found


@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, DTYPES * len(KINDS), strict=False)), ids=repr)
def test_it_compiles_and_moves_nothing_between_lanes_but_sums(kind: Vectors, dtype: torch.dtype, tmp_path) -> None:
    """Each kind in one of the dtypes, with K in whole turns and with some left: 16 bytes of the weight, and of x, come
    at a time, and scales as words of four.
    """
    whole = 128 * kind.together
    for n, k, bias in ((4096, whole * 16, True), (4097, whole * 3 + 128, False)):
        found = compile_for_hopper(launches(kind, kind.rows, n, k, dtype, bias)[0], tmp_path)
        assert found.registers <= kind.registers
        assert found.spilled == 0 or k % whole != 0
        assert len(re.findall(r"bar\.sync|barrier\.sync", found.ptx)) == 1, "between storing sums and adding them up"
        check_warp_sums(found.ptx, kind.warps, exchanged=kind.groups == 2)  # sums of both halves of K
        inner = loops(found.ptx)
        assert len(inner) == (1 if k % whole == 0 else 2)
        for loop in inner:
            assert "shared" not in loop
            reads = re.findall(r"ld\.global\S*", loop)
            wide = [read for read in reads if read.endswith(".v4.b32")]
            blocks = kind.blocks if loop is inner[0] else 1
            words, pairs = blocks * kind.outputs // 4, blocks * kind.rows // 2
            assert len([read for read in wide if "evict_first" in read]) == words
            assert len([read for read in wide if "evict_first" not in read]) == pairs
            assert len(reads) - len(wide) == blocks * kind.outputs // 8


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_compiles_for_the_chips_that_it_is_for_and_any_k(capability: int, dtype: torch.dtype) -> None:
    """Before sm_90 with other instructions, every kind."""
    for kind in KINDS if capability == 89 else (Vectors(4, 8, 4, 1, 40), Vectors(8, 16, 4, 1)):
        (launch,) = launches(kind, kind.rows, 4097, 4096 if kind in KINDS[::2] else 4128, dtype)
        if capability == 89:
            at = launch.kernel.arg_names.index("BY_FLOAT32") - len(launch.args)
            launch = replace(launch, constants=(*launch.constants[:at], True, *launch.constants[at + 1 :]))
        assert "mma.sync" in compile_for(launch, GPUTarget("cuda", capability, 32)).asm["ptx"]


# --- simulated ------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    gluon = SimpleNamespace(**GLUON)
    for module in (fragments, numbers, scaled_codes, mma_layouts, vectors):
        in_python(monkeypatch, module, gluon)
    for name in ("weight_layout", "x_layout", "group_layout"):
        monkeypatch.setattr(vectors, name, lambda *_: None)
    monkeypatch.setattr(vectors, "sum_of_warps", lambda total: total.sum(0))
    monkeypatch.setattr(vectors, "mma_v2", lambda one, other, total: total + torch.bmm(one.float(), other.float()))
    return gluon


BY_FLOAT32 = pytest.mark.parametrize("by_float32", [False, True], ids=["from sm_90 on", "before"])


def computed(
    gluon: SimpleNamespace,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kind: Vectors,
    by_float32: bool,
) -> Tensor:
    """What the kernel computes, program by program, with all tensors at the very end of their memory."""
    (m, k), n = x.shape, len(weight)
    out = torch.full((m, n), torch.nan, dtype=x.dtype)
    scales = scale.view(torch.int32) if k % 128 == 0 else scale
    tensors = (x.view(torch.int32), weight.view(torch.int32), scales, x if bias is None else bias, out)
    for program in range(kind.programs(n)):
        gluon.program_id = lambda _, program=program: torch.tensor(program)
        constants = (*kind.constants, k % (128 * kind.together) != 0, by_float32, bias is not None)
        vectors.mxfp8_linear_vectors(*map(Pointer, tensors), m, n, k, *constants)
    return out


@DTYPE
@BY_FLOAT32
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 32),
        (2, 7, 96),
        (3, 33, 288),
        (4, 40, 1024),
        (3, 20, 1920),
        (5, 17, 1056),
        (8, 130, 512),
        (7, 9, 1664),
        (9, 33, 800),
        (16, 24, 640),
    ],
)
def test_it_computes_linear_for_any_shape_and_reads_nothing_else(
    simulated: SimpleNamespace, dtype: torch.dtype, by_float32: bool, m: int, n: int, k: int
) -> None:
    x, weight, scale, bias = exact_linear_inputs(m, n, k, dtype)
    rows = 4 if m <= 4 else 8 if m <= 8 else 16
    for kind, offset in ((Vectors(rows, 8, 2, 2), bias), (Vectors(rows, 16, 4, 1), None)):
        actual = computed(simulated, x, weight, scale, offset, kind, by_float32)
        assert_same(actual, reference.linear(x, weight, scale, offset))


@DTYPE
@BY_FLOAT32
@pytest.mark.parametrize("k", [128, 96], ids=["words of scales", "bytes of scales"])
@pytest.mark.parametrize("kind", [Vectors(4, 8, 1, 1), Vectors(8, 16, 1, 1)], ids=repr)
def test_it_decodes_every_element(
    simulated: SimpleNamespace, dtype: torch.dtype, by_float32: bool, k: int, kind: Vectors
) -> None:
    """Under scales where something changes for one of the dtypes, and some in between."""
    scales = (0, 1, 2, 103, 104, 105, 113, 118, 119, 127, 142, 143, 152, 153, 245, 246, 254, 255)
    weight, scale = one_code_a_row(scales, k)
    actual = computed(simulated, torch.ones(2, k, dtype=dtype), weight, scale, None, kind, by_float32)
    assert_same(actual, what_codes_mean(weight, scale, dtype).expand(2, -1))


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_kind_takes_all_rows_of_x_and_has_work_for_most_of_its_warps() -> None:
    for m in range(2, 17):
        for n in (1, 7, 288, 1024, 4097, 28672, 151936):
            for k in (32, 96, 256, 1024, 3584, 4096, 28672):
                kind = plans_vectors.plan(m, n, k, 132)
                assert kind.rows == (4 if m <= 4 else 8 if m <= 8 else 16)
                assert kind.together <= max(k / 128 / 0.75, 4)


def test_small_weights_get_many_warps_and_large_ones_few() -> None:
    """As measured: 16 along K where outputs are few."""
    for m in (4, 8):
        assert [plans_vectors.plan(m, n, 8192, 132).warps for n in (512, 28672)] == [16, 4 if m == 4 else 2]


def test_what_was_measured_is_taken_where_plans_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all kinds that a problem may have; for another number of rows, shape or dtype it is measured anew."""
    launched: list[Launch] = []
    asked: list[tuple[object, ...]] = []

    def best(family: str, key: object, candidates: list[Vectors], default: Vectors, run) -> Vectors:
        asked.append((family, key))
        assert candidates == plans_vectors.kinds(m, k)
        assert default == plans_vectors.plan(m, n, k, 132)
        run(candidates[-1])
        return candidates[0]

    monkeypatch.setattr(vectors, "best", best)
    monkeypatch.setattr(vectors, "launch", lambda *args, **options: launched.append(Launch(*args, **options)))
    monkeypatch.setenv("MXFP8_AUTOTUNE", "1")
    for m, n, k, dtype in (
        (2, 33, 96, DTYPES[0]),
        (3, 33, 96, DTYPES[0]),
        (5, 7, 4096, DTYPES[0]),
        (5, 7, 4096, DTYPES[1]),
    ):
        with torch.device("meta"):
            x, weight = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=torch.uint8)
            vectors.linear(x, weight, torch.empty(n, k // 32, dtype=torch.uint8), None, 132, False)
        found = plans_vectors.kinds(m, k)
        assert [launch.num_warps for launch in launched[-2:]] == [found[-1].warps, found[0].warps]
    assert len(set(asked)) == 4
    monkeypatch.delenv("MXFP8_AUTOTUNE")
    vectors.linear(x, weight, torch.empty(n, k // 32, dtype=torch.uint8, device="meta"), None, 132, False)
    assert len(asked) == 4
    assert launched[-1].named["WARPS"] == plans_vectors.plan(m, n, k, 132).warps
