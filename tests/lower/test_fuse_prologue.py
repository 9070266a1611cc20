"""fuse-prologue: each rule, where it stops, and the values."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional

from tests.lower._everything import everything, targets  # noqa: F401
from tests.lower._graphs import lower
from tests.lower._weights import Net, linear, normal
from tests.lower.test_rms_norm import called, gemma, llama
from tests.surrounded import surrounded

pytestmark = pytest.mark.usefixtures("everything")
X = normal(2, 3, 64)
GAIN = nn.Parameter(torch.linspace(0.5, 2, 64), requires_grad=False)


def net(before, **members):
    members = {"gain": GAIN, "linear": linear(64, 96, bias=True)} | members
    return Net(lambda net, x: net.linear(before(net, x)), **members)


def weights(*kinds):
    """Linears without bias, whose weights have surroundings."""
    made = [surrounded(kind, (96, 64))[1] for kind in kinds]
    return [nn.Parameter(weight, requires_grad=False) for weight in made]


@pytest.mark.parametrize(
    ("kind", "prologue"),
    [("scale", ("scale",)), ("order", ("order",)), ("input rotation", ()), ("everything", ("order",))],
)
def test_what_stands_before_a_weight(kind, prologue):
    model = Net(lambda net, x: functional.linear(x, net.weight), weight=weights(kind)[0])
    done = lower(model, X)
    assert [request.prologue for request in done.requests] == [prologue]
    assert ("ptqc.hadamard.default" in done.calls) == (kind in ("input rotation", "everything"))
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-4)


def test_both_readers_of_one_scale_take_it_in(everything):  # noqa: F811
    first, second = surrounded("scale", (96, 64))[1], surrounded("scale", (96, 64), spec="int4g32")[1]
    model = Net(
        lambda net, x: [functional.linear(x, weight) for weight in (net.a, net.b)],
        a=nn.Parameter(first, requires_grad=False), b=nn.Parameter(second, requires_grad=False),
    )  # fmt: skip
    done = lower(model, X)
    assert [request.prologue for request in done.requests] == [("scale",)] * 2
    assert "mul" not in done.texts["fuse-prologue"]
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-4)


NORMS = {
    "the module": lambda net, x: net.norm(x),
    "called": lambda net, x: called(x, net.gain),
    "spelled out": lambda net, x: llama(x, net.gain),
    "1 + gain": lambda net, x: gemma(x, net.gain),
    "without gain": lambda net, x: torch.rms_norm(x, (64,), None, 1e-5),
    "and dropout": lambda net, x: functional.dropout(llama(x, net.gain), 0.1, False).contiguous(),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms(case):
    model = net(NORMS[case], norm=nn.RMSNorm(64, eps=1e-5).requires_grad_(False))
    done = lower(model, X)
    assert [request.prologue for request in done.requests] == [("rms_norm:1e-05",)]
    assert len(done.calls) == 1
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-5)


def test_before_and_after():
    model = Net(lambda net, x: functional.linear(llama(x, net.gain), net.weight), gain=GAIN, weight=weights("scale")[0])
    done = lower(model, X)
    assert_expected_inline(
        done.texts["merge-shared-input"],
        """\
x0 = input
v1 = x0.to(torch.float32)
v2 = v1.pow(2)
v3 = v2.mean(-1, keepdim=True)
v4 = add(v3, 1e-05)
v5 = rsqrt(v4)
v6 = mul(v1, v5)
v7 = v6.to(torch.float32)
v8 = mul(weight_0, v7)
v10 = mul(v8, around_0)
v13 = int8g32 [96, 64]: product(v10, [[parts_0, parts_1]], [])
return (v13,)""",
    )
    assert_expected_inline(
        done.texts["fuse-prologue"],
        """\
x0 = input
v4 = int8g32 [96, 64]: rms_norm:1e-05 > scale > product(x0, [[parts_0, parts_1]], [weight_0, around_0])
return (v4,)""",
    )


def test_a_norm_that_all_products_share_is_fused_once_they_are_one():
    def attention(net, x):
        x = llama(x, net.gain)
        return net.q(x), net.k(x)

    model = Net(attention, gain=GAIN, q=linear(64, 64), k=linear(64, 32, seed=3))
    done = lower(model, X)
    assert [(request.n, request.prologue) for request in done.requests] == [(96, ("rms_norm:1e-05",))]


def written(net, x):
    h = x * 2
    normed = llama(h, net.gain)
    h += 1
    return net.linear(normed) + h.sum()


LEFT = {
    "another reader": lambda net, x: (lambda y: net.linear(y) + y.sum())(llama(x, net.gain)),
    "two products of other specs": lambda net, x: (lambda y: (net.linear(y), net.other(y)))(llama(x, net.gain)),
    "a value that is written": written,
    "a value from inside": lambda net, x: (lambda h: net.linear(net.gain * h) + h.sum())(
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_does_not_fire(case):
    model = Net(LEFT[case], gain=GAIN, linear=linear(64, 96, bias=True), other=linear(64, 96, name="int8g32"))
    done = lower(model, X, is_checked=False)
    assert all(not request.prologue for request in done.requests)
    torch.testing.assert_close(done.output, model(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("norm", "made"), [(gemma, torch.float32), (llama, torch.bfloat16)])
def test_a_gain_that_is_made_stays_in_float32(norm, made):
    half = linear(64, 96, dtype=torch.bfloat16)
    gain = nn.Parameter(torch.linspace(0.001, 0.3, 64, dtype=torch.bfloat16), requires_grad=False)
    model = net(lambda net, x: norm(x, net.gain), linear=half, gain=gain)
    done = lower(model, X.bfloat16(), is_checked=False)
    assert [request.prologue for request in done.requests] == [("rms_norm:1e-05",)]
    (call,) = [node for node in done.module.graph.nodes if node.op == "call_function"]
    assert getattr(done.module, str(call.args[2][0].target)).dtype == made
    expected = model(X.bfloat16()).float()
    assert (done.output.float() - expected).norm() < 1e-2 * expected.norm()  # bfloat16: eager rounds four times more


def test_a_target_that_refuses_a_step_keeps_those_below(everything):  # noqa: F811
    everything.refused = ("rms_norm",)
    model = Net(lambda net, x: functional.linear(llama(x, net.gain), net.weight), gain=GAIN, weight=weights("scale")[0])
    done = lower(model, X)
    assert [request.prologue for request in done.requests] == [("scale",)]
    assert "rms_norm:1e-05 (everything: no rms_norm)" in str(done.context.chosen[0][1])
