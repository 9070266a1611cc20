"""AWQ: scales and clipping."""

from dataclasses import replace

import pytest
import torch

from ptqc import grid
from ptqc.errors import PtqcError
from ptqc.passes.methods.rtn import round_to_nearest
from ptqc.passes.transforms.awq import AWQ
from ptqc.spec import WeightSpec
from ptqc.transforms import TRANSFORMS, Member

W3, SCALES = WeightSpec.parse("int3g32z"), AWQ(clipping=False)


def member(out_features=48, in_features=64, salient=6, factor=20.0, spec=W3, lead=(), seed=0, channel=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, 512, in_features, generator=generator)
    x[..., torch.randperm(in_features, generator=generator)[:salient]] *= factor
    weight = torch.randn(*lead, out_features, in_features, generator=generator)
    return Member("w", weight, statistics_of(x), spec, channel=channel)


def statistics_of(x):
    rows = x.shape[-2]
    return {"hessian": x.mT @ x / rows, "mean_abs": x.abs().mean(-2), "count": torch.full(x.shape[:-2], float(rows))}


def error(one, factor=1.0, clipped=None):
    """tr(E H ET), over all matrices of a stack."""
    chosen = (one.weight if clipped is None else clipped) * factor
    change = grid.reconstruct(round_to_nearest(chosen, one.spec), one.spec) / factor - one.weight
    return float(((change @ one.statistics["hessian"]) * change).sum())


@pytest.mark.parametrize("spec", ["int3g32z", "int3g32", "int4", "nf4g64", "q4_K"])
def test_scales_lower_the_output_error_where_channels_are_salient(spec):
    one = member(spec=WeightSpec.parse(spec), in_features=256, salient=6)
    scale = SCALES.scale([one], 256)
    assert error(one, scale) < 0.8 * error(one)


def test_scales_never_raise_the_error_of_a_group():
    for seed in range(6):
        members = [member(salient=0, seed=seed), replace(member(16, seed=seed), weight=torch.randn(16, 64))]
        scale = AWQ(rows=16).scale(members, 64)
        if scale is not None:
            assert sum(error(one, scale) for one in members) <= sum(error(one) for one in members)


def test_descent_goes_below_the_grid():
    one = member()
    assert error(one, SCALES.scale([one], 64)) < error(one, replace(SCALES, descent=False).scale([one], 64))


def test_columns_that_share_a_channel_share_a_scale_and_others_stay():
    channel = torch.arange(32).repeat(2)
    channel[:4] = -1
    one = member(channel=channel, factor=50.0)
    scale = SCALES.scale([one], 32)
    factor = torch.where(channel < 0, 1.0, scale[channel])
    assert scale.shape == (32,) and error(one, factor) < error(one)


def test_a_stack_shares_one_scale_and_unused_experts_count_for_nothing():
    one = member(lead=(3,))
    scale = SCALES.scale([one], 64)
    assert scale.shape == (64,) and error(one, scale) < error(one)
    unused = dict(one.statistics) | {"count": torch.tensor([512.0, 512.0, 0.0])}
    unused["mean_abs"] = torch.cat([unused["mean_abs"][:2], torch.full((1, 64), torch.nan)])
    found = SCALES.scale([replace(one, statistics=unused)], 64)
    used = {name: value[:2] for name, value in one.statistics.items()}
    expected = SCALES.scale([replace(one, weight=one.weight[:2], statistics=used)], 64)
    assert torch.isfinite(found).all() and error(one, found) < error(one) and expected.shape == found.shape


def test_channels_without_input_stay():
    one = member()
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(3))
    x[:, :8] *= 30
    x[:, 60:] = 0
    scale = SCALES.scale([replace(one, statistics=statistics_of(x))], 64)
    assert torch.isfinite(scale).all() and (scale[60:] == 1).all()
    assert SCALES.scale([replace(one, statistics=statistics_of(torch.zeros(4, 64)))], 64) is None


@pytest.mark.parametrize("spec", ["int3g32z", "int3g32", "int2g32f", "int4"])
def test_clipping_lowers_the_error_of_every_row(spec):
    one = member(spec=WeightSpec.parse(spec), salient=3)
    clipped = AWQ().clip(one)
    for row in range(one.weight.shape[0]):
        alone = replace(one, weight=one.weight[row : row + 1])
        assert error(alone, clipped=clipped[row : row + 1]) <= error(alone) * (1 + 1e-5)
    assert error(one, clipped=clipped) < 0.97 * error(one)


def test_clipping_of_stacks_and_of_specs_without_scales_of_their_own():
    stack = member(lead=(2,), salient=3)
    clipped = AWQ().clip(stack)
    single = replace(stack, weight=stack.weight[1], statistics={k: v[1] for k, v in stack.statistics.items()})
    assert torch.equal(clipped[1], AWQ().clip(single))
    nested = member(spec=WeightSpec.parse("nf4g64dq"))
    assert AWQ().clip(nested) is nested.weight
    assert AWQ(clipping=False).clip(stack) is stack.weight


def test_options_and_defaults():
    kind = TRANSFORMS.get("awq")
    assert (kind.default_method, dict(kind.default_options), kind.default_group) == ("rtn", {"symmetric": False}, 128)
    assert kind().needs == {"hessian", "mean_abs", "count"}
    with pytest.raises(PtqcError, match="at least one"):
        AWQ(exponents=0)
    with pytest.raises(PtqcError, match="share of the range"):
        AWQ(narrowest=0.0)
