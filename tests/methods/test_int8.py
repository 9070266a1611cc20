"""INT8 per output channel."""

import pytest
import torch

from ptqc.errors import SpecError
from ptqc.methods import quantize_weight
from ptqc.passes.methods.int8 import Int8
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


def test_promises():
    check_method(Int8())
    check_method(Int8(), Int8().spec(group=32))


def test_specs():
    assert Int8().spec() == Int8().spec(8, -1) == WeightSpec.parse("int8")
    assert Int8().spec(group=128) == WeightSpec.parse("int8g128")
    with pytest.raises(SpecError, match="int8 has 8 bits, not 4; for other widths use rtn or hqq"):
        Int8().spec(4)
    assert "use rtn" in Int8().refuses(WeightSpec.parse("int8z"))


def test_one_scale_per_output_channel(seeded):
    weight = torch.randn(8, 64, generator=seeded) * torch.logspace(-3, 3, 8)[:, None]
    stored = quantize_weight(weight, Int8(), Int8().spec())
    assert stored.scale.shape == (8, 1)
    error = (stored.dequantize() - weight).abs().amax(-1) / weight.abs().amax(-1)
    assert (error < 0.55 / 127).all()
