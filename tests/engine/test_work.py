"""The work on a stage: scales folded exactly, left at run time or undone; statistics and corrections follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ptqc.engine.in_memory import InMemory
from ptqc.engine.jobs import jobs_of
from ptqc.engine.report import Report
from ptqc.engine.work import Stage
from ptqc.groups import ScaledParameter, ScaleGroup
from ptqc.recipe import make_rule
from ptqc.sites import find_sites
from ptqc.transforms import Member, Transform


@dataclass(frozen=True)
class Powers(Transform):
    """Scales by powers of two, which change no float."""

    def scale(self, members: Sequence[Member], channels: int) -> torch.Tensor:
        return 2.0 ** (torch.arange(channels) % 3 - 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


X = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))


def hidden(net):
    return torch.relu(net.up(X)).detach()


def group(kind="fold"):
    channel = torch.arange(32)
    producer = (ScaledParameter("up.weight", -2, channel, -1), ScaledParameter("up.bias", -1, channel, -1))
    consumers = (ScaledParameter("down.weight", -1, channel, 1),)
    return ScaleGroup("relu", 32, kind, producer if kind == "fold" else (), consumers)


def statistics(x):
    return {
        "hessian": x.T @ x / len(x),
        "absmax": x.abs().amax(0),
        "mean_abs": x.abs().mean(0),
        "mean": x.mean(0),
        "rows": x[:64],
        "count": torch.tensor(float(len(x))),
    }


def staged(net, method="rtn", groups=(), check=None, **request):
    """Work on a net with statistics of its real values; the stage and its report."""
    found = {"up.weight": statistics(X), "down.weight": statistics(hidden(net))}
    rule = make_rule("*", method, **request)
    work = [(site, rule) for site in find_sites(net)[0]]
    jobs = jobs_of(work)
    weights, report = InMemory(net, [site for site, _ in work], jobs), Report()
    Stage(jobs, groups, weights, found.__getitem__, report, check).run()
    weights.commit()
    return report


@pytest.fixture
def net(seeded):
    return Net().eval()


class TestScales:
    @pytest.mark.parametrize("method", ["rtn", "gptq"])
    def test_errors_cost_what_the_method_leaves_of_them(self, net, method):
        seen = []

        @dataclass(frozen=True)
        class Looks(Transform):
            def scale(self, members, channels):
                seen.extend(members)

        full = statistics(hidden(net))["hessian"]
        staged(net, [Looks(), method], [group()], bits=4, group_size=16)
        hessian = seen[0].statistics["hessian"]
        is_fed_back = method == "gptq"
        assert torch.equal(hessian, hessian.diagonal().diag()) == is_fed_back
        assert torch.equal(hessian, full) == (not is_fed_back)
        if is_fed_back:  # the column that is rounded last pays in full
            damped = full.diagonal() + 0.0101 * full.diagonal().mean()
            assert (hessian.diagonal() <= damped).all()
            assert hessian.diagonal().sum() < 0.9 * full.diagonal().sum()
    def test_a_fold_keeps_the_function(self, net):
        expected = net(X)
        report = staged(net, [Powers(), "rtn"], [group()], bits=8, group_size=-1)
        assert report.counts == {"folded": 1}
        assert torch.dist(net(X), expected) / expected.norm() < 0.02
        assert not net.down.weight.surroundings.input_scale

    def test_a_fold_reaches_producer_and_consumer(self, net):
        before = net.up.bias.detach().clone()
        staged(net, [Powers(), "rtn"], [group()], bits=8, group_size=-1)
        assert torch.equal(net.up.bias, before / Powers().scale([], 32))

    def test_without_a_producer_the_input_is_multiplied_at_run_time(self, net):
        expected = net(X)
        report = staged(net, [Powers(), "rtn"], [group("run-time")], bits=8, group_size=-1)
        assert report.counts == {"run-time": 1}
        assert torch.equal(net.down.weight.input_scale, 1 / Powers().scale([], 32))
        assert torch.dist(net(X), expected) / expected.norm() < 0.02

    def test_a_fold_that_fails_its_check_is_undone(self, net):
        report = staged(net, [Powers(), "rtn"], [group()], check=lambda before, after: 1e-3)
        assert report.counts == {"undone": 1}

    def test_only_the_wrong_one_of_two_folds_is_undone(self, net):
        other = ScaleGroup("x", 16, "fold", (), (ScaledParameter("up.weight", -1, torch.arange(16), 1),))

        def check(before, after):
            ratio = after["up.weight"] / before["up.weight"]
            return 0.0 if torch.allclose(ratio, ratio[:, :1].expand_as(ratio)) else 1.0

        report = staged(net, [Powers(), "rtn"], [group(), other], check=check)
        assert [outcome.done for outcome in report.groups] == ["folded", "undone"]

    def test_refused_groups_are_left(self, net):
        assert staged(net, [Powers(), "rtn"], [group("refused")]).counts == {"left": 1}


@dataclass(frozen=True)
class Looks(Transform):
    """Keeps what it is shown."""

    seen: list

    def __hash__(self):
        return id(self)

    def clip(self, member):
        self.seen.append(member)
        return member.weight


class TestStatistics:
    def test_statistics_follow_a_fold(self, net):
        looks, scale = Looks([]), Powers().scale([], 32)
        x = hidden(net)
        staged(net, [Powers(), looks, "rtn"], [group()])
        found = next(member for member in looks.seen if member.name == "down.weight").statistics
        expected = statistics(x / scale)
        for name in ("hessian", "absmax", "mean_abs", "mean", "rows"):
            torch.testing.assert_close(found[name], expected[name])

    def test_weights_of_one_value_share_their_statistics(self, seeded):
        net = nn.ModuleDict({"q": nn.Linear(16, 16), "k": nn.Linear(16, 16)})
        looks, shared = Looks([]), statistics(X)
        channel = torch.arange(16)
        consumers = tuple(ScaledParameter(f"{name}.weight", -1, channel, 1) for name in net)
        rule = make_rule("*", [Powers(), looks, "rtn"])
        work = [(site, rule) for site in find_sites(net)[0]]
        jobs = jobs_of(work)
        groups = [ScaleGroup("x", 16, "run-time", (), consumers)]
        Stage(jobs, groups, InMemory(net, [s for s, _ in work], jobs), lambda name: shared, Report()).run()
        assert looks.seen[0].statistics["hessian"] is looks.seen[1].statistics["hessian"]


class TestActivations:
    def test_static_scales_come_from_the_range(self, net):
        x = hidden(net)
        staged(net, "rtn", bits=8, group_size=-1, activation="int8-tensor-static")
        torch.testing.assert_close(net.down.weight.act_scale, x.abs().max() / 127)

    def test_activation_is_kept_with_the_weight(self, net):
        expected = net(X)
        staged(net, "rtn", bits=8, group_size=-1, activation="int8-token")
        assert str(net.up.weight.surroundings.act) == "int8-token"
        assert 0 < torch.dist(net(X), expected) / expected.norm() < 0.02


@dataclass(frozen=True)
class AddsOne(Transform):
    def correct(self, member, stored):
        return torch.ones(stored.shape[0])


def test_corrections_reach_the_bias(net):
    before = net.down.bias.detach().clone()
    staged(net, [AddsOne(), "rtn"])
    torch.testing.assert_close(net.down.bias, before + 1)


def test_nothing_changes_before_commit(net):
    rule = make_rule("*", [Powers(), "rtn"])
    work = [(site, rule) for site in find_sites(net)[0]]
    jobs, before = jobs_of(work), net(X)
    weights = InMemory(net, [site for site, _ in work], jobs)
    Stage(jobs, [group()], weights, lambda name: {}, Report()).run()
    assert torch.equal(net(X), before)
    assert weights.values.keys() == {"up.weight", "up.bias", "down.weight"}
