"""Machine code of the GPU kernels, cross-compiled: instructions per weight, spills, tensor cores."""

import pytest
import torch

from benchmarks._gates import Case, compile_around, variant_of
from tests.targets.interpreted import needs_triton


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("spec", "rows"), [("int4g128", 1), ("int4g128", 16), ("int4g64z", 16), ("nf4g64", 16)])
def test_the_gates_hold(spec, rows, capability, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    row = variant_of(Case(spec, torch.float16, rows, capability)).measure()
    assert row.failures == ()
    assert row.matrices.startswith("HMMA" if capability == 80 else ("HGMMA", "HMMA"))


@needs_triton
@pytest.mark.slow
def test_inputs_of_8_bits_use_their_tensor_cores(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    assert variant_of(Case("int8", torch.float16, 64, 90, "int8-token")).measure().matrices.startswith("IGMMA")
    assert variant_of(Case("int4g128", torch.float16, 16, 80, "int8-token")).measure().matrices.startswith("IMMA")
    assert variant_of(Case("fp8e4m3", torch.float16, 64, 90, "fp8e4m3-token")).measure().matrices.startswith("QGMMA")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("spec", "act"), [("int4g64z", "float"), ("e8p3", "float"), ("int4g64f", "int8-token")])
def test_the_kernels_around_the_product_compile(spec, act):
    compile_around(spec, act, ("rms_norm:1e-6", "order"), ("bias", "gate_silu", "add"), 90)
