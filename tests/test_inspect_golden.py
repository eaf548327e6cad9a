"""What mxfp8-inspect prints, as text; regenerate with EXPECTTEST_ACCEPT=1."""

from __future__ import annotations

from pathlib import Path

import expecttest
import pytest
from commands import run

from mxfp8_ops.cpu import library

PACKED = """\
from models_here import two_layers


def one_packed():
    model, inputs = two_layers()
    model[0].weight_scale[0, 0] = 255
    model[0].pack_()
    return model, inputs
"""


class TestGolden(expecttest.TestCase):
    @pytest.fixture(autouse=True)
    def in_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The factories are importable, and this machine's instruction set does not show."""
        monkeypatch.setattr(library, "level", lambda: "avx2")
        (folder / "packed_here.py").write_text(PACKED, encoding="utf-8")

    def test_folded_model_prints_the_table_and_the_diff(self) -> None:
        status, out, err = run("models_here:two_layers", "--dequant-at-load", "on", "--context", 0)
        assert (status, err) == (0, "")
        self.assertExpectedInline(
            out,
            """\
torch VERSION, compiled without caches: every graph is generated anew

== models_here:two_layers: flag on

 weight             shape   action   bytes before   bytes after   kernel              reason
 ------------------------------------------------------------------------------------------------------------
 0.weight           96x64   folded          6,336        18,624   extern_kernels.mm   dequantized to bfloat16
 1.weight           32x96   folded          3,168         9,312   extern_kernels.mm   dequantized to bfloat16
 ------------------------------------------------------------------------------------------------------------
 total: 2 weights                           9,504        27,936

memory of the weights: 9,504 bytes before, 27,936 at most, 27,936 after
passes: ? s of ? s to compile (?%)

== graph 1 of 1, flag on: before and after
@@ -1,2 +0,0 @@
-input 0.weight: f8e4m3fn[96, 64]
-input 0.weight_scale: u8[96, 2]
@@ -4,4 +2,4 @@
-input 1.weight: f8e4m3fn[32, 96]
-input 1.weight_scale: u8[32, 3]
-linear: bf16[8, 96] = mxfp8.linear(input, 0.weight, 0.weight_scale, None)
-linear_1: bf16[8, 32] = mxfp8.linear(linear, 1.weight, 1.weight_scale, None)
+input 0.weight.dequantized: bf16[96, 64]
+input 1.weight.dequantized: bf16[32, 96]
+linear: bf16[8, 96] = linear(input, 0.weight.dequantized, None)
+linear_1: bf16[8, 32] = linear(linear, 1.weight.dequantized, None)

time: ? s to load the target, ? s to compile, ? s to report""",
        )

    def test_two_flags_print_side_by_side(self) -> None:
        status, out, _ = run("models_here:by_hand", "--dequant-at-load", "on", "off", "--context", 1)
        assert status == 0
        self.assertExpectedInline(
            out,
            """\
torch VERSION, compiled without caches: every graph is generated anew

== models_here:by_hand: side by side

 weight      flag on    bytes after   flag off              bytes after
 ----------------------------------------------------------------------
 w           folded           6,208   unmatched                   2,112
 fc.weight   folded           6,208   kept                        2,112
 ----------------------------------------------------------------------
 total       2 folded        12,416   1 kept, 1 unmatched         4,224


== models_here:by_hand: flag on

 weight             shape   action   bytes before   bytes after   kernel              reason
 ------------------------------------------------------------------------------------------------------------
 w                  32x64   folded          2,112         6,208   extern_kernels.mm   dequantized to bfloat16
 fc.weight          64x32   folded          2,112         6,208   extern_kernels.mm   dequantized to bfloat16
 ------------------------------------------------------------------------------------------------------------
 total: 2 weights                           4,224        12,416

memory of the weights: 4,224 bytes before, 12,416 at most, 12,416 after
passes: ? s of ? s to compile (?%)

== graph 1 of 1, flag on: before and after
@@ -1,10 +1,7 @@
-input w: f8e4m3fn[32, 64]
-input s: u8[32, 2]
 input x: bf16[4, 64]
-input fc.weight: f8e4m3fn[64, 32]
-input fc.weight_scale: u8[64, 1]
-dequant: bf16[32, 64] = mxfp8.dequant(w, s, bfloat16)
-getattr: bf16[64, 32] = getattr(dequant, T)
+input w.dequantized: bf16[32, 64]
+input fc.weight.dequantized: bf16[64, 32]
+getattr: bf16[64, 32] = getattr(w.dequantized, T)
 matmul: bf16[4, 32] = matmul(x, getattr)
-linear: bf16[4, 64] = mxfp8.linear(matmul, fc.weight, fc.weight_scale, None)
+linear: bf16[4, 64] = linear(matmul, fc.weight.dequantized, None)
 return (linear,)

== models_here:by_hand: flag off

 weight             shape   action      bytes before   bytes after   kernel                                    reason
 -------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------
 w                  32x64   unmatched          2,112         2,112   cpp_fused_dequant_0 + extern_kernels.mm   dequantized in every call for matmul, which is not linear; not folded: the flag is not on
 fc.weight          64x32   kept               2,112         2,112   mxfp8.linear (cpu, avx2)                  the flag is not on
 -------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------
 total: 2 weights                              4,224         4,224

memory of the weights: 4,224 bytes before, 4,224 at most, 4,224 after
passes: ? s of ? s to compile (?%)

== graph 1 of 1, flag off: before and after
(nothing changed in the graph)

time: ? s to load the target, ? s to compile, ? s to report""",
        )

    def test_graph_break_is_named_with_its_place(self) -> None:
        status, out, _ = run("models_here:breaking")
        assert status == 0
        self.assertExpectedInline(
            out,
            """\
torch VERSION, compiled without caches: every graph is generated anew

== models_here:breaking: flag unset

 weight             shape   action   bytes before   bytes after   kernel                     reason
 --------------------------------------------------------------------------------------------------------------
 first.weight       64x64   kept            4,224         4,224   mxfp8.linear (cpu, avx2)   the flag is not on
 second.weight      32x64   kept            2,112         2,112   mxfp8.linear (cpu, avx2)   the flag is not on
 --------------------------------------------------------------------------------------------------------------
 total: 2 weights                           6,336         6,336

memory of the weights: 6,336 bytes before, 6,336 at most, 6,336 after
graph 1 of 2 ends at a graph break: models_here.py:42 in forward: Call to `torch._dynamo.graph_break()`
  User-inserted graph break. Message: None
passes: ? s of ? s to compile (?%)

== graph 1 of 2, flag unset: before and after
(nothing changed in the graph)

== graph 2 of 2, flag unset: before and after
(nothing changed in the graph)

time: ? s to load the target, ? s to compile, ? s to report""",
        )

    def test_packed_weight_is_told_apart_from_one_that_is_not(self) -> None:
        status, out, _ = run("packed_here:one_packed", "--dequant-at-load", "on", "--context", 0)
        assert status == 0
        self.assertExpectedInline(
            out,
            """\
torch VERSION, compiled without caches: every graph is generated anew

== packed_here:one_packed: flag on

 weight             shape   action   bytes before   bytes after   kernel                            reason
 ----------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------
 1.weight           32x96   folded          3,168         9,312   extern_kernels.mm                 dequantized to bfloat16
 0.weight_packed    96x64   kept           17,024        17,024   mxfp8.linear_packed (reference)   packed, exact decoding for bfloat16, which some codes need (on GPUs; here unpacked in every call); not folded while packed: unpack_() first
 ----------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------------
 total: 2 weights                          20,192        26,336

memory of the weights: 20,192 bytes before, 26,336 at most, 26,336 after
passes: ? s of ? s to compile (?%)

== graph 1 of 1, flag on: before and after
@@ -3,2 +3,1 @@
-input 1.weight: f8e4m3fn[32, 96]
-input 1.weight_scale: u8[32, 3]
+input 1.weight.dequantized: bf16[32, 96]
@@ -6,1 +5,1 @@
-linear: bf16[8, 32] = mxfp8.linear(linear_packed, 1.weight, 1.weight_scale, None)
+linear: bf16[8, 32] = linear(linear_packed, 1.weight.dequantized, None)

time: ? s to load the target, ? s to compile, ? s to report""",
        )
