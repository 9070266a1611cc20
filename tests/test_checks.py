"""check_transform finds transforms that break a promise; assert_same_function finds functions that differ."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ptqc.checks import assert_same_function, check_transform, sample_statistics
from ptqc.surroundings import Surroundings
from ptqc.transforms import TRANSFORMS, Transform


@dataclass(frozen=True)
class Broken(Transform):
    """Does one thing wrong."""

    how: str = ""

    def scale(self, members, channels):
        wrong = {
            "negative": -torch.ones(channels),
            "short": torch.ones(channels - 1),
            "dead": 1 / members[0].statistics["mean_abs"],
            "double": torch.ones(channels).double(),
        }
        if self.how == "changing":
            members[0].weight[0, 0] += 1
        if self.how == "random":
            return 1 + torch.rand(channels)
        return wrong.get(self.how, torch.ones(channels))

    def around(self, member):
        if self.how == "lossy":
            return Surroundings(input_scale=True), {"input_scale": torch.full((64,), torch.inf)}
        return Surroundings(), {}

    def clip(self, member):
        return member.weight[:-1] if self.how == "clipped" else member.weight

    def correct(self, member, stored):
        return torch.ones(3) if self.how == "corrected" else None


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("negative", "positive and finite"), ("short", r"float32 \[channels\]"), ("double", r"float32 \[channels\]"),
        ("dead", "always zero: scales must be positive and finite"), ("changing", "was changed|second time"),
        ("random", "second time"), ("clipped", "clipped weight"), ("corrected", r"correction must be finite, \[out\]"),
    ],
)  # fmt: skip
def test_broken_transforms_are_found(how, says):
    with pytest.raises(AssertionError, match=says):
        check_transform(Broken(how))


def test_what_cannot_be_undone_is_found():
    with pytest.raises(Exception, match="finite factors"):
        check_transform(Broken("lossy"))


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_every_transform_keeps_its_promises(name):
    check_transform(TRANSFORMS.get(name)())


def test_functions_that_differ_are_told_apart():
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    batch = {"input": torch.randn(3, 8)}
    assert_same_function(model, lambda input: model(input) * (1 + 1e-6), batch, tolerance=1e-5)
    for other, says in (
        (lambda input: model(input) + 1, "output 0: relative difference .*, allowed are 1.00e-05"),
        (lambda input: model(input) * torch.nan, "relative difference nan"),
        (lambda input: model(input)[:2], "shape"),
        (lambda input: (model(input), input), "1 tensors became 2"),
    ):
        with pytest.raises(AssertionError, match=says):
            assert_same_function(model, other, batch, tolerance=1e-5)
    assert_same_function(model, model, [batch["input"]], tolerance=0)


def test_sample_statistics_belong_together():
    statistics = sample_statistics(32, rows=64)
    rows = statistics["rows"]
    assert torch.allclose(statistics["hessian"], rows.T @ rows / 64)
    assert torch.allclose(statistics["mean_square"], statistics["hessian"].diagonal())
    assert (statistics["absmax"] >= statistics["percentile"]).all()
    assert statistics.keys() == {"hessian", "absmax", "mean_abs", "mean_square", "mean", "percentile", "rows", "count"}
