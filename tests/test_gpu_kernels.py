"""The Triton kernels without a device: interpreted, and compiled for every target."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mxfp8_ops import gpu

pytest.importorskip("triton")

import triton
from compiling import check_warp_sums

NVIDIA = (80, 86, 89, 90, 100)


def test_interpreted_kernels_give_the_bits_of_the_reference() -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "interpreted.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def ptx(kernel: Any, capability: int, warps: int, types: dict[str, str], **constants: Any) -> str:
    """What Triton generates for a device that need not be there; pointers and K are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name not in ("rows", "blocks")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]


@pytest.mark.parametrize("capability", NVIDIA)
@pytest.mark.parametrize(("m", "dtype"), [(1, "bf16"), (2, "fp16"), (4, "bf16")])
def test_gemv_compiles_for_every_target_and_reads_16_bytes_at_a_time(capability: int, m: int, dtype: str) -> None:
    """It scales elements of float16 before they are widened, sums of others."""
    from mxfp8_ops.gpu import gemv

    native, pointer = capability >= 89, f"*{dtype}"
    types = {"x": pointer, "weight": "*fp8e4nv" if native else "*u8", "scale": "*u8", "bias": pointer, "out": pointer}
    types |= {"rows": "i32", "N": "i32", "K": "i32"}
    outputs, elements, warps = gemv.configuration(4096, m)
    lowest, highest = gemv.FAST_SCALES[torch.bfloat16 if dtype == "bf16" else torch.float16]
    sizes = {"M": m, "BN": outputs, "BK": elements, "EXACT_BK": 256, "LOWEST": lowest, "HIGHEST": highest}
    text = ptx(gemv.mxfp8_linear_gemv, capability, warps, types, HAS_BIAS=True, NATIVE=native, **sizes)
    assert re.search(r"ld\.global\S*evict_first\S*\.v4\.b32", text)
    assert ("cvt.rn.f16x2.e4m3x2" in text) == native
    assert ("mul.f16" in text) == (dtype == "fp16")


@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("m", [17, 64])
def test_mma_compiles_and_moves_nothing_between_lanes_but_sums_16_bytes_at_a_time(
    capability: int, dtype: str, m: int
) -> None:
    gluon = pytest.importorskip("triton.experimental.gluon")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from mxfp8_ops.gpu import mma

    plan = mma.plan(m, 4096, 4096, 132)
    types = {"x": "*i32", "weight": "*i32", "scale": "*u8", "bias": f"*{dtype}", "out": f"*{dtype}"}
    types |= {"M": "i32", "N": "i32", "K": "i32"}
    language = gluon.language
    constants = {"DTYPE": language.bfloat16 if dtype == "bf16" else language.float16, "HAS_BIAS": True}
    constants |= {"BN": plan.outputs, "BM": plan.rows, "BK": plan.elements}
    constants |= {"ALONG": plan.along, "ACROSS": plan.across, "STAGES": plan.stages}
    names = mma.mxfp8_linear_mma.arg_names
    source = GluonASTSource(
        mma.mxfp8_linear_mma,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if name not in ("M", "N")},
    )
    options = {"num_warps": plan.along * plan.across}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = compiled.asm["ptx"]
    loop = re.search(r"(?s)\n(\$L__BB0_\d+):(?:(?!\n\$L__BB0_).)*mma\.sync.*?bra\S*\s+\1;", text)
    assert loop is not None
    assert "st.shared" not in loop[0]
    check_warp_sums(text, plan.along)
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", loop[0])
    # The barrier once a stage has arrived is enough: what is copied afterwards goes to the stage of the last turn,
    # which all warps have read when they meet there. Triton before 3.9 has another one before the copy.
    assert re.search(r"(?s)wait_group.*bar\.sync.*ld\.shared.*mma\.sync.*cp\.async\.cg", loop[0])
    assert loop[0].count("bar.sync") <= 2


@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (4096, 4096), (4097, 4096), (4096, 2080)])
def test_vector_asks_for_all_of_a_step_before_it_computes_and_waits_once_for_its_warps(
    capability: int, dtype: torch.dtype, n: int, k: int
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from compiling import Launch, compile_for
    from triton.backends.compiler import GPUTarget

    from mxfp8_ops.gpu import vector

    recorded = []
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector, "launch", lambda *args, **options: recorded.append(Launch(*args, **options)))
        weight, scale = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n, k // 32, dtype=torch.uint8)
        vector.linear(torch.empty(1, k, dtype=dtype), weight, scale, None, 132)
    text = compile_for(recorded[0], GPUTarget("cuda", capability, 32)).asm["ptx"]
    fast = text.partition("st.global")[0]
    loop = re.search(r"(?s)\n(\$L__BB0_\d+):(?:(?!\n\$L__BB0_).)*e4m3x2.*?bra\S*\s+\1;", fast)
    assert (loop is not None) == (k == 14336)  # else a step or two, written out
    loads, _, products = (loop[0] if loop else fast).partition("cvt.rn.f16x2.e4m3x2")
    steps = 2 if k == 4096 else 1
    assert len(re.findall(r"ld\.global\S*evict_first\S*\.v4\.b32", loads)) == 4 * steps  # one for each output
    assert len(re.findall(r"ld\.global\S*\.b8", loads)) == 4 * steps
    assert not re.search(r"[ls][dt]\.shared|bar\.sync|shfl", loop[0] if loop else loads)
    assert not re.search(r"ld\.global\S*evict_first", products.partition("bar.sync")[0]) or k == 2080  # the rest of K
    assert fast.count("bar.sync") == 1
    assert fast.count("shfl") == 3
    assert text.count("bar.sync") <= 8  # to add up the warps' sums, of either path


@pytest.mark.parametrize(
    ("n", "k", "warps"),
    [(4096, 4096, 4), (14336, 4096, 1), (8192, 8192, 2), (28672, 8192, 4), (8, 1024, 2), (8, 96, 1)],
)
def test_vector_has_the_most_warps_with_which_all_programs_run_at_once(n: int, k: int, warps: int) -> None:
    from mxfp8_ops.gpu import vector

    assert vector.warps_along(n, k, 132) == warps


@pytest.mark.parametrize("capability", NVIDIA)
def test_elementwise_kernels_compile_for_every_target_without_a_float8_type(capability: int) -> None:
    from mxfp8_ops.gpu import elementwise

    sizes = {"NATIVE": False, "BLOCK": 32, "BLOCKS": 64}
    for out in ("*bf16", "*fp16", "*fp32"):
        types = {"codes": "*u8", "scales": "*u8", "out": out, "blocks": "i32"}
        assert "e4m3" not in ptx(elementwise.mxfp8_dequant, capability, 4, types, **sizes)
    types = {"x": "*bf16", "codes": "*u8", "scales": "*u8", "blocks": "i32"}
    assert "e4m3" not in ptx(elementwise.mxfp8_quantize, capability, 4, types, RCEIL=True, **sizes)


def test_missing_triton_is_one_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "mxfp8_ops.gpu.dispatch", None)
    monkeypatch.delattr("mxfp8_ops.gpu.dispatch", raising=False)
    try:
        with pytest.warns(UserWarning, match="MXFP8 runs on the slow reference: Triton cannot be imported"):
            assert gpu.kernels() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert gpu.kernels() is None
    finally:
        gpu.kernels.cache_clear()


def test_triton_is_not_imported_before_a_kernel_is_needed() -> None:
    program = "import sys, mxfp8_ops; print('mxfp8_ops.gpu.dispatch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert not torch.cuda.is_initialized()
