"""ZeroQuant: groups, int8 inputs, and that distillation lowers the error of the outputs."""

import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.methods import quantize_weight
from ptqc.passes.methods.zeroquant import ZeroQuant
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


def rows(features):
    return {"rows": torch.randn(64, features, generator=torch.Generator().manual_seed(3))}


@pytest.mark.parametrize("bits", [8, 4])
def test_promises(bits):
    check_method(ZeroQuant(), ZeroQuant().spec(bits, 32))


def test_promises_of_distillation():
    check_method(ZeroQuant(distill=3), ZeroQuant().spec(8, 32), statistics=rows, slack=1.2)


def test_specs():
    assert ZeroQuant().spec() == WeightSpec.parse("int8g64")
    assert ZeroQuant().spec(4, -1) == WeightSpec.parse("int4")
    assert ZeroQuant().activation == ActSpec.parse("int8-token")
    assert ZeroQuant().needs == frozenset()
    assert ZeroQuant(distill=8).needs == {"rows"}
    assert "symmetric integers" in ZeroQuant().refuses(WeightSpec.parse("int4g64z"))
    with pytest.raises(SpecError, match="0 steps or more"):
        ZeroQuant(distill=-1)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_distillation_lowers_the_error_of_outputs(bits, lead, seeded):
    weight = torch.randn(*lead, 32, 64, generator=seeded)
    x = torch.randn(*lead, 128, 64, generator=seeded) @ torch.randn(64, 64, generator=seeded)

    def error(distill):
        method = ZeroQuant(distill)
        stored = quantize_weight(weight, method, method.spec(bits, 32), statistics={"rows": x})
        return float((x @ (stored.dequantize() - weight).mT).norm())

    assert error(60) < 0.95 * error(0)
    assert error(5) < error(0)


def test_distillation_never_does_worse(seeded):
    weight, x = torch.randn(32, 64, generator=seeded), torch.randn(128, 64, generator=seeded)
    distilled, rounded = (
        quantize_weight(weight, method, method.spec(), statistics={"rows": x}).dequantize() - weight
        for method in (ZeroQuant(3), ZeroQuant())
    )
    assert (x @ distilled.t()).norm() <= 1.0001 * (x @ rounded.t()).norm()


def test_weights_and_statistics_are_left_alone(seeded):
    weight, x = torch.randn(4, 64, generator=seeded), torch.randn(32, 64, generator=seeded)
    before = weight.clone(), x.clone()
    ZeroQuant(distill=2).choose(weight, WeightSpec.parse("int8"), {"rows": x})
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])
