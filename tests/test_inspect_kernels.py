"""Reading the code that Inductor generates."""

from __future__ import annotations

from lowering.inspect import kernels, stages
from lowering.report import POST_GRAD, GeneratedCode, GraphReport
from lowering.text import Line

# --- generated code --------------------------------------------------------------------------------------------

PROGRAM = """\
# AOT ID: ['7_inference']
# kernel path: /tmp/torchinductor_me/ab/cab.py
triton_poi_fused_relu_0 = async_compile.triton('triton_poi_fused_relu_0', '''
def triton_poi_fused_relu_0(in_ptr0): pass
''', device_str='cuda')
def call(self, args):
        arg0_1, arg1_1 = args
        # Topologically Sorted Source Nodes: [linear, ], Original ATen: [aten.mm]
        # [Provenance debug handles] extern_kernels.mm:1
        extern_kernels.mm(arg0_1, arg1_1, out=buf0)
        del arg0_1
        # [Provenance debug handles] triton_poi_fused_relu_0:2
        triton_poi_fused_relu_0.run(buf0, 256, stream=stream0)
        buf1 = torch.ops.mxfp8.linear.default(buf0, arg2_1, arg3_1, None)
        return (buf1, )
"""


def test_calls_of_generated_code_are_found_with_handle_source_and_definition() -> None:
    graph = GraphReport(code=[GeneratedCode(stages.normalised(PROGRAM))])
    first, second, third = kernels.kernels(graph)
    assert (first.name, first.nodes, first.definition) == ("extern_kernels.mm", ("linear",), "")
    assert first.call == "extern_kernels.mm(arg0_1, arg1_1, out=buf0)"
    assert second.name == "triton_poi_fused_relu_0"
    assert second.definition.startswith("triton_poi_fused_relu_0 = async_compile.triton(")
    assert second.definition.endswith("''', device_str='cuda')")
    assert (third.name, third.nodes) == ("torch.ops.mxfp8.linear.default", ())


def test_normalised_code_has_no_counter_and_no_folder() -> None:
    text = stages.normalised(PROGRAM + '#include "/tmp/torchinductor_me/xy/cxy.h"\na = b / c\n')
    assert "AOT ID" not in text
    assert "/tmp" not in text
    assert '#include "cxy.h"' in text
    assert "a = b / c" in text


def test_a_name_of_nodes_in_several_graphs_means_all_of_them_and_who_calls_graphs_computes_nothing() -> None:
    program = "".join(
        f"# [Provenance debug handles] {name}:{i}\n{name}(x)\n"
        for i, name in enumerate(("extern_kernels.mxfp8_linear", "extern_kernels.add"))
    )
    handles = {"extern_kernels.mxfp8_linear:0": ("linear",), "extern_kernels.add:1": ("add", "cond")}
    graph = GraphReport(code=[GeneratedCode(program, handles)])
    graph.stages[POST_GRAD] = [
        [Line("", "linear", ("one",), True, "mxfp8.linear"), Line("", "add", (), False, "aten.add")],
        [Line("", "linear", ("other",), True, "mxfp8.linear")],
        [Line("", "cond", ("one", "other"), False, "cond")],
    ]
    linear, add = kernels.kernels(graph)
    assert (linear.name, linear.weights) == ("extern_kernels.mxfp8_linear", ("one", "other"))
    assert (add.name, add.weights) == ("extern_kernels.add", ())
