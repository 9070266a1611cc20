"""Sensitivity: the second-order loss agrees with the measured one where errors are small."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ptqc.errors import PtqcError
from ptqc.methods import METHODS, quantize_weight
from ptqc.sensitivity import Forms, by_fisher, by_kl
from ptqc.spec import WeightSpec


class Classifier(nn.Module):
    """Two layers; with logits, or with a plain tensor as its output."""

    def __init__(self, has_logits):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(4, 4)
        self.has_logits = has_logits

    def forward(self, x):
        out = 3 * self.second(self.first(x).relu())
        return SimpleNamespace(logits=out) if self.has_logits else {"states": [out]}


def setting(has_logits, specs=("int4g16", "int6g16")):
    model = Classifier(has_logits).requires_grad_(False)
    rtn = METHODS.get("rtn")()
    forms = [
        Forms(name, weight, [quantize_weight(weight, rtn, WeightSpec.parse(spec)) for spec in specs])
        for name, weight in model.named_parameters()
        if name in ("first.weight", "second.weight")
    ]
    batches = [{"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    return model, forms, batches


@pytest.mark.parametrize(("has_logits", "factor"), [(True, 1.0), (False, None)])
def test_both_measures_agree(has_logits, factor):
    model, forms, batches = setting(has_logits)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = torch.tensor(by_kl(model, forms, batches))
    expanded = torch.tensor(by_fisher(model, forms, batches, draws=64))
    ratio = expanded / measured
    assert (measured > 0).all()
    assert (ratio / (factor or float(ratio.mean()))).log().abs().max() < 0.7
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_the_same_seed_gives_the_same_losses():
    model, forms, batches = setting(True)
    steps = []
    first = by_fisher(model, forms, batches, seed=3, on_step=lambda done, total: steps.append((done, total)))
    assert first == by_fisher(model, forms, batches, seed=3)
    assert first != by_fisher(model, forms, batches, seed=4)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_weight_that_no_batch_reaches_costs_nothing():
    model, _, batches = setting(True)
    stored = quantize_weight(model.idle.weight, METHODS.get("rtn")(), WeightSpec.parse("int2"))
    forms = [Forms("idle.weight", model.idle.weight, [stored])]
    assert by_fisher(model, forms, batches) == [[0.0]]
    assert by_kl(model, forms, batches) == [[0.0]]


def test_an_output_without_tensors_is_an_error():
    class Silent(nn.Module):
        def forward(self):
            return {}

    with pytest.raises(PtqcError, match="holds no tensor to compare"):
        by_kl(Silent(), [], [{}])
