"""Whole models through torch.compile: C++ kernels with what is fused into them, against eager dequantizing."""

import pytest
import torch

import ptqc.api as api
from ptqc.codegen.cpp.isa import running_isa
from ptqc.codegen.cpp.toolchain import compiler, missing_tools
from ptqc.kernel_log import chosen_kernels
from tests.tiny import IDS, tiny

pytestmark = pytest.mark.skipif(
    isinstance(running_isa(), str) or missing_tools(compiler(), running_isa()) is not None, reason="no C++ compiler"
)


@pytest.mark.parametrize(
    ("exact", "bar"), [pytest.param(True, 1e-4, marks=pytest.mark.slow), (False, 5e-2)], ids=["exact", "int8"]
)  # the second: 1.2e-2 for each of four products behind one another, and what they do to the attention between them
def test_a_llama_runs_on_fused_kernels(exact, bar):
    torch._dynamo.reset()
    model = api.quantize(tiny("plain"), "rtn", bits=4, group_size=32, progress=False)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        compiled = torch.compile(model, backend="ptqc", options={"exact": exact})
        got = compiled(input_ids=IDS).logits
    assert float((got - expected).norm() / expected.norm()) < bar
    kernels = chosen_kernels(model)
    assert {kernel.kernel.target for kernel in kernels} == {"cpp"}
    chains = {(kernel.request.prologue, kernel.request.epilogue) for kernel in kernels}
    assert (("rms_norm:1e-06",), ("gate_silu",)) in chains
    assert ((), ("add",)) in chains
