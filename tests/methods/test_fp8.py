"""FP8 weights: the three granularities."""

import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.methods import quantize_weight
from ptqc.passes.methods.fp8 import Float8
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
def test_promises(granularity):
    check_method(Float8(granularity))


def test_specs():
    assert Float8().spec() == WeightSpec.parse("fp8e4m3")
    assert Float8().spec(8, 64) == WeightSpec.parse("fp8e4m3g64")
    assert Float8("tensor").spec() == WeightSpec.parse("fp8e4m3t")
    assert Float8("block").spec(group=-1) == WeightSpec.parse("fp8e4m3b128x128")
    with pytest.raises(SpecError, match="no granularity 'row'; use channel, tensor, block"):
        Float8("row")
    with pytest.raises(SpecError, match="per block has no groups of 64"):
        Float8("block").spec(group=64)
    with pytest.raises(SpecError, match="8 bits, not 4"):
        Float8().spec(4)
    assert Float8().refuses(WeightSpec.parse("fp8e4m3b128x128")) is None
    assert Float8().refuses(WeightSpec.parse("fp8e5m2")) is not None


@pytest.mark.parametrize("inputs", ["float", "token", "tensor", "static"])
def test_inputs(inputs):
    name = {"float": "float", "static": "fp8e4m3-tensor-static"}.get(inputs, f"fp8e4m3-{inputs}")
    assert Float8(inputs=inputs).activation == ActSpec.parse(name)
    with pytest.raises(SpecError, match="use float, token, tensor, static"):
        Float8(inputs="row")


@pytest.mark.parametrize(("granularity", "scales"), [("channel", (200, 1)), ("tensor", (1, 1)), ("block", (2, 3))])
def test_the_largest_of_a_scale_becomes_448(granularity, scales, seeded):
    weight = torch.randn(200, 300, generator=seeded)
    stored = quantize_weight(weight, Float8(granularity), Float8(granularity).spec())
    assert stored.codes.dtype == torch.float8_e4m3fn
    assert (stored.scale.shape, stored.scale.dtype) == (scales, torch.float32)
    assert float(stored.codes.float().abs().amax()) == 448
    assert float(stored.scale.amax()) == pytest.approx(float(weight.abs().amax()) / 448)


def test_three_mantissa_bits(seeded):
    weight = torch.randn(16, 256, generator=seeded)
    numbers = quantize_weight(weight, Float8(), Float8().spec()).dequantize()
    normal = weight.abs() > weight.abs().amax(-1, keepdim=True) / 448 * 2**-6
    assert ((numbers - weight).abs() <= weight.abs() * 2**-4 * 1.0001)[normal].all()
