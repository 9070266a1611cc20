"""Bias correction."""

import torch

from ptqc.passes.transforms.bias_correction import BiasCorrection
from ptqc.spec import WeightSpec
from ptqc.transforms import TRANSFORMS, Member


def test_the_mean_error_of_the_output_is_gone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator) + 2
    weight = torch.randn(16, 32, generator=generator)
    stored = weight + 0.1 * torch.randn(16, 32, generator=generator)
    one = Member("w", weight, {"mean": x.mean(0)}, WeightSpec.parse("int4"))
    change = BiasCorrection().correct(one, stored)
    before = (x @ (stored - weight).mT).mean(0)
    assert before.abs().max() > 0.5
    torch.testing.assert_close(before + change, torch.zeros(16), atol=1e-4, rtol=0)


def test_it_asks_for_the_mean_and_changes_nothing_else():
    transform = TRANSFORMS.get("bias_correction")()
    assert transform.needs == {"mean"}
    weight = torch.ones(4, 8)
    one = Member("w", weight, {"mean": torch.ones(8)}, WeightSpec.parse("int4"))
    assert transform.scale([one], 8) is None and transform.clip(one) is weight and transform.around(one)[1] == {}
    assert transform.correct(one, weight).abs().max() == 0
