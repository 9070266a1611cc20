import pytest
import torch
from torch import nn

from ptqc.assign import assign, quantize_site
from ptqc.errors import PtqcError, SpecError
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


class Scaling(Transform):
    def scale(self, members, channels):
        return None


def test_a_rotation_needs_no_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    (site,), _ = find_sites(model)
    rule = make_rule("*", ["hadamard", "rtn"], bits=4, group_size=32)
    ((_, chosen),), _ = assign([site], [rule])
    weight = quantize_site(site, chosen)
    assert weight.surroundings.input_rotation is not None and "input_signs" in weight.extras
    plain = quantize_site(site, make_rule("*", "rtn", bits=4, group_size=32))
    errors = [(stored.dequantize() - model[0].weight).norm() for stored in (weight, plain)]
    assert 0 < errors[0] < 1.5 * errors[1]


def test_what_no_spec_can_store_is_left_with_a_reason():
    model = nn.Sequential(nn.Linear(20, 48), nn.Linear(48, 64))
    rules = [make_rule("0*", "rtn", spec="int4g48"), make_rule("*", "rtn", bits=4)]
    with pytest.raises(SpecError, match=r'cannot store "0.weight" as int4g48: group 48 does not divide'):
        assign(find_sites(model)[0], rules)
    work, left = assign(find_sites(model)[0], [make_rule("*", "quip_sharp", bits=2)], has_data=True)
    assert [site.name for site, _ in work] == ["1.weight"]
    assert [entry.name for entry in left] == ["0.weight"] and "which do not divide in_features 20" in left[0].reason


def test_a_transform_is_refused_without_data():
    sites, _ = find_sites(nn.Sequential(nn.Linear(64, 64)))
    rule = Rule("*", RoundToNearest(), RoundToNearest().spec(), transforms=(Scaling(),))
    with pytest.raises(PtqcError, match="needs the graph of the model; pass calibration"):
        assign(sites, [rule])
