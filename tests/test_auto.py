"""Auto: the budget is kept, sensitive weights get more bits, and the recipe says it all."""

import pytest
import torch
from torch import nn

from ptqc.assign import assign, quantize_site
from ptqc.auto import auto
from ptqc.errors import PtqcError
from ptqc.recipe import load_recipe, recipe_rows
from ptqc.sites import find_sites


class Model(nn.Module):
    """Two branches of one shape; the output hardly depends on the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.loud(x) + 1e-3 * self.quiet(x)


DATA = [{"x": torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]


def spent(model, recipe):
    work, _ = assign(find_sites(model)[0], recipe)
    stored = [quantize_site(site, rule) for site, rule in work]
    return 8 * sum(weight.nbytes for weight in stored) / sum(weight.numel() for weight in stored)


@pytest.mark.parametrize("measure", ["fisher", "kl"])
def test_bits_go_where_they_help(measure):
    model = Model()
    recipe = auto(model, DATA, bits=5.25, base="rtn", group_size=32, measure=measure)
    chosen = {rule.pattern: rule.spec.bits for rule in recipe}
    assert chosen["loud.weight"] >= 6 > chosen["quiet.weight"]
    assert 4.5 < spent(model, recipe) <= 5.25
    assert load_recipe(recipe_rows(recipe)) == recipe


def test_candidates_and_exclusions():
    model = Model()
    recipe = auto(model, DATA, bits=6, base="rtn", candidates=["int4g32", "int5g32z", 8], exclude=["quiet"])
    assert [(rule.pattern, str(rule.spec)) for rule in recipe] == [("loud.weight", "int5g32z")]
    assert all(rule.is_exact for rule in recipe)


def test_half_precision_on_a_cpu_is_measured_in_float32():
    model = Model().half()
    assert len(auto(model, [{"x": DATA[0]["x"]}], bits=4.5, base="rtn", group_size=32)) == 2
    assert model.loud.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 1.5}, "1.5 bits per weight are too few: the smallest candidates take 2.250"),
        ({"base": "nf4"}, "3.5 bits per weight are too few: the smallest candidates take 4.5"),
        ({"candidates": ["nf4g64"], "base": "hqq"}, "hqq fits integer codes"),
        ({"exclude": ["*"]}, "nothing to choose for"),
    ],
)
def test_requests_that_cannot_be(options, says):
    with pytest.raises(PtqcError, match=says):
        auto(Model(), DATA, **{"base": "rtn", "group_size": 64, **options})


def test_names_within_names_stay_apart():
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32)))
    recipe = auto(model, [{"input": torch.randn(8, 32)}], bits=5, base="rtn", group_size=32)
    assert [rule.pattern for rule in recipe] == ["re:^0\\.weight$", "1.0.weight"]
