"""SmoothQuant."""

from dataclasses import replace

import pytest
import torch

from ptqc import grid
from ptqc.act_spec import ActSpec
from ptqc.activations import fake_quantize
from ptqc.errors import PtqcError
from ptqc.passes.methods.rtn import round_to_nearest
from ptqc.passes.transforms.smoothquant import SmoothQuant
from ptqc.spec import WeightSpec
from ptqc.transforms import TRANSFORMS, Member

INT8, STATIC = WeightSpec.parse("int8"), ActSpec(dtype="int8", scale="tensor", is_static=True)


def member(x, out_features=24, act=STATIC, channel=None, seed=0, lead=()):
    weight = torch.randn(*lead, out_features, x.shape[-1], generator=torch.Generator().manual_seed(seed))
    statistics = {"absmax": x.abs().amax(-2), "rows": x, "count": torch.full(x.shape[:-2], float(x.shape[-2]))}
    return Member("w", weight, statistics, INT8, act, channel)


def with_outliers(*lead, features=32):
    x = torch.randn(*lead, 64, features, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 100
    return x


def output_error(one, scale):
    x, factor = one.statistics["rows"], scale if one.channel is None else scale[one.channel]
    step = (x / factor).abs().max() / 127
    weight = one.weight * factor
    stored = grid.reconstruct(round_to_nearest(weight, INT8), INT8)
    made = fake_quantize(x / factor, one.act, step if one.act.is_static else None) @ stored.mT
    return float((made - x @ one.weight.mT).norm())


def test_alpha_one_half_gives_inputs_and_weights_equal_magnitudes():
    first, second = member(with_outliers(), seed=2), member(with_outliers(), seed=3)
    scale = SmoothQuant().scale([first, second], 32)
    inputs = first.statistics["absmax"] / scale
    weights = torch.stack([one.weight.abs().amax(0) * scale for one in (first, second)]).amax(0)
    ratio = inputs / weights
    torch.testing.assert_close(ratio, ratio.mean().expand(32))
    assert scale.log().mean().abs() < 1e-5


def test_inputs_in_floating_point_are_not_smoothed():
    floating, static = member(with_outliers(), act=ActSpec()), member(with_outliers())
    assert "int8-token" in SmoothQuant().refuses([floating])
    assert SmoothQuant().refuses([floating, static]) is None


def test_it_rescues_static_activations():
    one = member(with_outliers())
    for alpha in (0.5, "search"):
        assert output_error(one, SmoothQuant(alpha=alpha).scale([one], 32)) < 0.2 * output_error(one, torch.ones(32))


def test_the_search_is_no_worse_than_any_alpha():
    one = member(with_outliers(), act=ActSpec(dtype="int8"))
    found = output_error(one, SmoothQuant(alpha="search").scale([one], 32))
    assert found <= 1.001 * min(output_error(one, SmoothQuant(alpha=a).scale([one], 32)) for a in (0.2, 0.5, 0.8))


def test_a_group_that_would_lose_is_left_alone():
    """Two bits, and the largest inputs meet the largest weights: they would take the whole range of their groups."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 10
    one = replace(member(x, act=ActSpec(dtype="int8")), spec=WeightSpec.parse("int2g32"))
    one.weight[:, 0] *= 10
    assert SmoothQuant(alpha=1.0).scale([one], 32) is None
    assert SmoothQuant(alpha=1.0, is_held=False).scale([one], 32) is not None


def test_columns_that_share_a_channel_take_the_largest():
    channel = torch.arange(16).repeat(2)
    channel[5] = -1
    one = member(with_outliers(), channel=channel)
    scale = SmoothQuant(alpha=1.0, is_held=False).scale([one], 16)
    x = one.statistics["absmax"]
    expected = torch.maximum(torch.where(channel[:16] < 0, 0, x[:16]), x[16:])
    torch.testing.assert_close(scale / scale[0], expected / expected[0])


def test_dead_channels_stay_and_stacks_share_one_scale():
    x = with_outliers(4)
    x[..., 7] = 0
    one = member(x, lead=(4,))
    one.weight[..., 9] = 0
    for alpha in (0.5, "search"):
        scale = SmoothQuant(alpha=alpha).scale([one], 32)
        assert scale.shape == (32,) and bool((torch.isfinite(scale) & (scale > 0)).all())
        assert scale[7] == 1 and scale[9] == 1


def test_options():
    assert "rows" in TRANSFORMS.get("smoothquant")().needs
    assert SmoothQuant(is_held=False).needs == {"absmax"}
    assert "rows" in SmoothQuant(alpha="search").needs
    with pytest.raises(PtqcError, match="between 0 and 1"):
        SmoothQuant(alpha=2.0)
