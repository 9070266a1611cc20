"""Propagation of one scale: what dies, what has to scale along, and through which operators."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptqc.capture import capture
from ptqc.passes.groups.operands import facts, parameter_key
from ptqc.passes.groups.propagate import propagated
from ptqc.passes.groups.trace import Seed
from ptqc.program import program
from tests.groups.structures import Model


def scaled(run, axis: int = -1, offset: float = 0.0, x=None, **parameters):
    """Scale `w` along an axis and follow it; returns the channels, the model's seeds by name."""
    model = Model(run, **{name: nn.Parameter(value) for name, value in parameters.items()}).eval()
    batch = {"x": torch.randn(2, 8, 16) if x is None else x}
    graph = facts(program(capture(model, batch)[0], model, batch))
    names = {parameter_key(value): name for name, value in model.named_parameters()}
    channel = torch.arange(model.w.shape[axis], dtype=torch.int32)
    channels = propagated([graph], Seed(parameter_key(model.w), axis, channel, Fraction(1), offset))
    return channels, {names[key]: seed for key, seed in channels.seeds.items()}


PASSES = {
    "relu": F.relu,
    "abs": torch.abs,
    "negated slices": lambda h: torch.cat([-h[..., 4:], h[..., :4]], -1).roll(4, -1),
    "views": lambda h: h.view(2, 8, 4, 4).permute(0, 2, 1, 3).flip(-1).flip(-1).transpose(1, 2).reshape(2, 8, 16),
    "sum over time": lambda h: h.sum(1, keepdim=True).expand(2, 8, 16) + h,
    "cumulative sum": lambda h: h.cumsum(1),
    "pooling over time": lambda h: F.avg_pool1d(h.transpose(1, 2), 2).transpose(1, 2).repeat_interleave(2, 1),
    "padding": lambda h: F.pad(h, (0, 0, 1, -1)) + h,
    "gather of rows": lambda h: h[:, torch.tensor([3, 1, 4, 1, 5, 2, 6, 0])],
    "selection by sign": lambda h: torch.where(h > 0, h, 0.1 * h),
    "maximum with zero": lambda h: torch.maximum(h, torch.zeros_like(h)),
    "index_add": lambda h: torch.zeros_like(h).index_add(1, torch.arange(8), h),
    "square root of a square": lambda h: h.pow(2).sqrt(),
    "glu": lambda h: F.glu(torch.cat([h, torch.ones_like(h)], -1)),
}
STOPS = {
    "gelu": (F.gelu, "gelu"),
    "tanh": (torch.tanh, "tanh"),
    "a number is added": (lambda h: h + 1, "number"),
    "softmax": (lambda h: torch.softmax(h, -1), "_softmax"),
    "mean over channels": (lambda h: h - h.mean(-1, keepdim=True), "mean"),
    "norm": (lambda h: F.layer_norm(h, (16,)), "normalised again"),
    "another order is added": (lambda h: h + h.flip(-1), "residual"),
    "square plus itself": (lambda h: h + h * h, "two powers"),
    "product of two orders": (lambda h: h * h.flip(-1), "multiplied by another"),
    "rounding": (lambda h: h.to(torch.int32).float(), "rounded"),
    "scores": (lambda h: (h @ h.transpose(1, 2)) @ torch.ones(2, 8, 16), "another activation"),
    "sorting channels": (lambda h: h.sort(-1)[0], "ranked"),
    "an operator that is not known": (lambda h: torch.fft.fft(h).real, "not known"),
}


@pytest.mark.parametrize("case", PASSES)
def test_scales_pass(case):
    def run(m, x):
        return PASSES[case](x * m.w) @ m.columns.t()

    channels, seeds = scaled(run, w=torch.rand(16), columns=torch.rand(4, 16))
    assert not channels.is_dead.any(), channels.deaths
    assert seeds["columns"].axis == -1
    assert seeds["columns"].degree == -1
    assert seeds["columns"].channel.tolist() == list(range(16))


@pytest.mark.parametrize("case", STOPS)
def test_scales_die_with_a_reason(case):
    change, reason = STOPS[case]

    def run(m, x):
        return change(x * m.w) @ m.columns.t()

    channels, _ = scaled(run, w=torch.rand(16), columns=torch.rand(4, 16))
    assert channels.are_all_dead
    assert any(reason in death.reason for death in channels.deaths)


def test_rows_that_the_data_chooses_pass_and_channels_that_it_chooses_do_not():
    def rows(m, x):
        return (x * m.w)[:, torch.argsort(x[0, :, 0])] @ m.columns.t()

    def channels(m, x):
        return (x * m.w)[..., torch.argsort(x[0, 0])] @ m.columns.t()

    parameters = {"w": torch.rand(16), "columns": torch.rand(4, 16)}
    assert not scaled(rows, **parameters)[0].is_dead.any()
    assert scaled(channels, **parameters)[0].are_all_dead


def test_only_the_channels_that_are_touched_die():
    def run(m, x):
        h = x * m.w
        return torch.cat([h[..., :4], F.gelu(h[..., 4:])], -1) @ m.columns.t()

    channels, seeds = scaled(run, w=torch.rand(16), columns=torch.rand(4, 16))
    assert channels.is_dead.tolist() == [False] * 4 + [True] * 12
    assert seeds["columns"].channel.tolist() == [0, 1, 2, 3] + [-1] * 12


def test_a_bias_scales_along():
    def run(m, x):
        return F.relu(x @ m.w.t() + m.bias) @ m.columns.t()

    channels, seeds = scaled(run, axis=-2, w=torch.rand(16, 16), bias=torch.rand(16), columns=torch.rand(4, 16))
    assert not channels.is_dead.any()
    assert (seeds["bias"].degree, seeds["columns"].degree) == (1, -1)


def test_a_weight_in_halves_scales_in_both():
    def run(m, x):
        h = x * m.w
        return h[..., :8] @ m.columns[:, :8].t() + h[..., 8:] @ m.columns[:, 8:].t()

    channels, seeds = scaled(run, w=torch.rand(16), columns=torch.rand(4, 16))
    assert not channels.is_dead.any()
    assert seeds["columns"].channel.tolist() == list(range(16))


def test_an_offset_is_part_of_the_gain_and_other_uses_of_the_weight_are_leaks():
    def alone(m, x):
        return (x * (1 + m.w)) @ m.columns.t()

    def twice(m, x):
        return (x * (1 + m.w)) @ m.columns.t() + m.w.sum()

    parameters = {"w": torch.rand(16), "columns": torch.rand(4, 16)}
    assert not scaled(alone, offset=1.0, **parameters)[0].is_dead.any()
    assert scaled(twice, offset=1.0, **parameters)[0].are_all_dead


def test_convolutions_take_a_scale_along_their_channels():
    def run(m, x):
        return F.conv1d((x * m.w).transpose(1, 2), m.kernel, m.bias, padding=1)

    more = {"kernel": torch.rand(4, 16, 3), "bias": torch.rand(4)}
    channels, seeds = scaled(run, w=torch.rand(16), **more)
    assert not channels.is_dead.any()
    assert (seeds["kernel"].axis, seeds["kernel"].degree) == (-2, -1)
    assert "bias" not in seeds
