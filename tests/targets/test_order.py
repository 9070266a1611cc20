"""What GPU kernels hold of a weight, backwards: every spec that has a form, in words and in bytes."""

import pytest
import torch

from ptqc import storage
from ptqc.act_spec import ActSpec
from ptqc.codegen.gpu.eight_bit import eight_bit_form
from ptqc.codegen.gpu.forms import form_of
from ptqc.codegen.gpu.launch import EightBitLinear, Linear
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec
from tests.cpp._run import random_parts

INTEGERS = [f"int{bits}g64{zero}" for bits in range(1, 9) for zero in ("", "z", "f")]
SPECS = (
    *INTEGERS, "int8", "int4", "ternary", "ternaryg64", "nf4g64", "nf4g64dq", "fp4g64", "mxfp4", "fp8e4m3",
    "fp8e5m2g64", "fp8e4m3b128x128", "e8p", "e8p3", "e8p4", "q4_0", "q6_K", "int4g16", "int8g32", "nf4g32",
)  # fmt: skip
N, K = 194, 1280
GATE = ("gate_silu",)


def layouts(name):
    """Every layout of a spec: types of 16 and 32 bits, inputs of 8 bits, with and without a gate."""
    spec = WeightSpec.parse(name)
    for epilogue in ((), GATE):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if not isinstance(form_of(spec, K, dtype), str):
                yield Linear(name, N, K, dtype, {}, (), epilogue).layout
        act = ActSpec.parse("fp8e4m3-token" if name.startswith("fp8") else "int8-token")
        if not isinstance(eight_bit_form(KernelRequest(spec, N, K, torch.float16, "cpu", act)), str):
            yield EightBitLinear(name, N, K, torch.float16, {}, (), epilogue, str(act)).layout


@pytest.mark.parametrize("name", SPECS)
def test_what_was_taken_comes_back(name):
    spec = WeightSpec.parse(name)
    made = random_parts(spec, N, K, torch.Generator().manual_seed(0))
    parts = {part: made[part] for part in storage.part_names(spec)}
    found = list(layouts(name))
    assert found
    for layout in found:
        prepared = layout.prepare(list(parts.values()))
        for part in layout.restorable:
            restored, stored = layout.restore(part, prepared, 30, 150), parts[part][30:180]
            if part == "codes":
                assert torch.equal(restored.view(torch.uint8), stored.view(torch.uint8)), layout
            else:
                torch.testing.assert_close(restored.float(), stored.float(), rtol=1e-3, atol=0)


def test_minima_are_not_given_back():
    assert all(layout.restorable == () for layout in layouts("int4g64m"))


def test_equal_kernels_hold_equal_weights():
    plain, other = (Linear("int4g128", N, K, torch.float16, {}, (), epilogue) for epilogue in ((), ("bias", "silu")))
    assert plain.layout == other.layout and hash(plain.layout) == hash(other.layout)
    assert plain.layout != Linear("int4g128", N, K, torch.float16, {}, (), GATE).layout
