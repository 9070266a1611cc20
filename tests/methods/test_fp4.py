"""FP4: the promises, and its order of codes."""

import pytest
import torch

from ptqc.errors import SpecError
from ptqc.methods import quantize_weight
from ptqc.packing import unpack_linear
from ptqc.passes.methods.fp4 import FloatingPoint4
from ptqc.passes.methods.nf4 import NormalFloat4
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


@pytest.mark.parametrize("double_quant", [False, True])
def test_promises(double_quant):
    check_method(FloatingPoint4(double_quant))


def test_specs():
    assert FloatingPoint4().spec() == WeightSpec.parse("fp4g64")
    assert FloatingPoint4(double_quant=True).spec() == WeightSpec.parse("fp4g64dq")
    with pytest.raises(SpecError, match="fp4 has 4 bits, not 8"):
        FloatingPoint4().spec(8)


def test_the_code_is_sign_exponent_mantissa():
    weight = torch.tensor([[12.0, 8, 6, 4, 3, 2, 0.0625, 0, -12, -8, -6, -4, -3, -2, -0.0625, 0]])
    stored = quantize_weight(weight, FloatingPoint4(), FloatingPoint4().spec(group=16))
    assert torch.equal(stored.dequantize(), weight)
    codes = unpack_linear(stored.codes, 4, 16)[0].tolist()
    assert codes[:7] == [3, 2, 5, 4, 7, 6, 1]
    assert [code - 8 for code in codes[8:15]] == codes[:7]


def test_nf4_is_nearer_to_normal_weights(seeded):
    weight = torch.randn(64, 512, generator=seeded)
    errors = [
        (quantize_weight(weight, method, method.spec()).dequantize() - weight).norm()
        for method in (NormalFloat4(), FloatingPoint4())
    ]
    assert errors[0] < errors[1]
