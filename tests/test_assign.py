import pytest
import torch
from torch import nn

from ptqc.assign import assign, quantize_site
from ptqc.errors import PtqcError
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.recipe import Rule, make_rule
from ptqc.sites import find_sites
from ptqc.transforms import Transform


class NeedsData(RoundToNearest):
    needs = frozenset({"hessian"})


def test_the_first_rule_that_matches_wins_and_the_rest_has_a_reason():
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b", "c")})
    recipe = [make_rule("a", None), make_rule("b", "rtn", bits=8), Rule("a", RoundToNearest())]
    work, left = assign(find_sites(model)[0], recipe)
    assert [site.name for site, _ in work] == ["b.weight"]
    assert {entry.name: entry.reason for entry in left} == {
        "a.weight": "the recipe keeps it",
        "c.weight": "no rule of the recipe matches",
    }
    weight = quantize_site(*work[0])
    assert weight.spec.bits == 8
    assert torch.allclose(weight.dequantize(), model["b"].weight, atol=1e-2)


def test_a_method_that_needs_data_is_refused_without():
    sites, _ = find_sites(nn.Sequential(nn.Linear(64, 64)))
    rule = Rule("*", NeedsData(), RoundToNearest().spec())
    assert assign(sites, [rule], has_data=True)[0] == [(sites[0], rule)]
    with pytest.raises(PtqcError, match=r"NeedsData needs statistics of the inputs \(hessian\)"):
        assign(sites, [rule])


def test_a_transform_is_refused_without_data():
    sites, _ = find_sites(nn.Sequential(nn.Linear(64, 64)))
    rule = Rule("*", RoundToNearest(), RoundToNearest().spec(), transforms=(Transform(),))
    with pytest.raises(PtqcError, match="needs the graph of the model; pass calibration"):
        assign(sites, [rule])
