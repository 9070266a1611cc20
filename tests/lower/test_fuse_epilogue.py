"""fuse-epilogue: each rule, where it stops, and the values."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional

from tests.lower._everything import everything, targets  # noqa: F401
from tests.lower._graphs import lower
from tests.lower._weights import Net, linear, normal

pytestmark = pytest.mark.usefixtures("everything")
X = normal(2, 3, 64)


def net(after, **members):
    """A linear [96, 64] with a bias, and what happens to its result y."""
    return Net(lambda net, x, *more: after(net, net.linear(x), *more), linear=linear(64, 96, bias=True), **members)


CASES = {
    "bias later": (lambda net, y: y + net.v, ("bias", "bias")),
    "vector from the left": (lambda net, y: net.v + y, ("bias", "bias")),
    "output scale": (lambda net, y: y * net.v, ("bias", "scale")),
    "number": (lambda net, y: 0.5 * y, ("bias", "scale")),
    "sum with a number": (lambda net, y: y + 2, ("bias", "bias")),
    "silu": (lambda net, y: functional.silu(y), ("bias", "silu")),
    "silu in place": (lambda net, y: functional.silu(y, inplace=True), ("bias", "silu")),
    "gelu": (lambda net, y: functional.gelu(y), ("bias", "gelu")),
    "gelu_tanh": (lambda net, y: functional.gelu(y, approximate="tanh"), ("bias", "gelu_tanh")),
    "relu": (lambda net, y: torch.relu(y), ("bias", "relu")),
    "relu method": (lambda net, y: y.relu(), ("bias", "relu")),
    "squared relu": (lambda net, y: functional.relu(y).square(), ("bias", "relu2")),
    "relu ** 2": (lambda net, y: functional.relu(y) ** 2, ("bias", "relu2")),
    "sigmoid": (lambda net, y: torch.sigmoid(y), ("bias", "sigmoid")),
    "tanh": (lambda net, y: y.tanh(), ("bias", "tanh")),
    "matrix": (lambda net, y, z: y * z, ("bias", "mul")),
    "residual": (lambda net, y, z: z + y, ("bias", "add")),
    "in place on the result": (lambda net, y, z: y.add_(z), ("bias", "add")),
    "dropout": (lambda net, y, z: z + functional.dropout(y, 0.1, training=False), ("bias", "add")),
    "three steps": (lambda net, y, z: functional.silu(y) * net.v + z, ("bias", "silu", "scale", "add")),
    "chunk": (lambda net, y: (lambda g, u: functional.silu(g) * u)(*y.chunk(2, -1)), ("bias", "gate_silu")),
    "split": (lambda net, y: (lambda g, u: u * functional.gelu(g))(*y.split(48, dim=-1)), ("bias", "gate_gelu")),
    "slices": (lambda net, y: functional.relu(y[..., :48]) * y[:, :, 48:], ("bias", "gate_relu")),
    "gate and after": (lambda net, y: torch.sigmoid(y[..., :48]) * y[..., 48:] * 2, ("bias", "gate_sigmoid", "scale")),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case):
    after, expected = CASES[case]
    more = [normal(2, 3, 96, seed=4)] if after.__code__.co_argcount == 3 else []
    model = net(after, v=normal(96, seed=5))
    done = lower(model, X, *more)
    assert [request.epilogue for request in done.requests] == [expected]
    assert done.counts["fuse-epilogue"] == 1
    torch.testing.assert_close(done.output, model(X, *more), rtol=1e-5, atol=1e-5)


LEFT = {
    "a second reader": (lambda net, y: (functional.silu(y), y), ("bias",)),
    "broadcast over rows": (lambda net, y: y + net.v[:3, None], ("bias",)),
    "a vector per row": (lambda net, y, z: y * z[..., :1], ("bias",)),
    "an unknown activation": (lambda net, y: functional.leaky_relu(y), ("bias",)),
    "a sum that bfloat16 rounds": (lambda net, y: y + 0.3, ("bias",)),
    "in place on the other": (lambda net, y, z: z.add_(y), ("bias",)),
    "an operand written later": (lambda net, y, z: (y + z, z.mul_(2)), ("bias",)),
    "halves the other way": (lambda net, y: y[..., :48] * functional.silu(y[..., 48:]), ("bias",)),
    "uneven pieces": (lambda net, y: functional.silu(y[..., :32]).sum() * y[..., 32:], ("bias",)),
    "halves of rows": (lambda net, y: functional.silu(y[:1]) * y[1:], ("bias",)),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_does_not_fire(case):
    after, expected = LEFT[case]
    dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
    more = [normal(2, 3, 96, seed=4, dtype=dtype)] if after.__code__.co_argcount == 3 else []
    model = Net(
        lambda net, x, *more: after(net, net.linear(x), *more),
        linear=linear(64, 96, bias=True, dtype=dtype), v=normal(96, seed=5, dtype=dtype),
    )  # fmt: skip
    done = lower(model, X.to(dtype), *[z.clone() for z in more], is_checked=False)
    assert [request.epilogue for request in done.requests] == [expected]
    assert done.counts["fuse-epilogue"] == 0
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(done.output, model(X.to(dtype), *more), rtol=tolerance, atol=tolerance)


def test_before_and_after():
    model = Net(
        lambda net, x, z: z + functional.dropout(functional.silu(net.linear(x)) * net.v, 0.2, False),
        linear=linear(64, 96, bias=True), v=normal(96, seed=5),
    )  # fmt: skip
    done = lower(model, X, normal(2, 3, 96, seed=4))
    assert_expected_inline(
        done.texts["fuse-prologue"],
        """\
x0 = input
v = input
x1 = input
v3 = int4g32 [96, 64]: product > bias(x0, [[parts_0, parts_1]], [weight_1])
v4 = silu(v3)
v5 = mul(v4, v)
v6 = dropout(v5, 0.2, False)
v7 = add(x1, v6)
return (v7,)""",
    )
    assert_expected_inline(
        done.texts["fuse-epilogue"],
        """\
x0 = input
v = input
x1 = input
v3 = int4g32 [96, 64]: product > bias > silu > scale > add(x0, [[parts_0, parts_1]], [weight_1, v, x1])
return (v3,)""",
    )


def test_a_float32_island_is_fused_whole_or_not_at_all():
    def island(net, x):
        return functional.silu(net.linear(x).float()).to(torch.bfloat16)

    model = Net(island, linear=linear(64, 96, dtype=torch.bfloat16))
    done = lower(model, X.bfloat16(), is_checked=False)
    assert [request.epilogue for request in done.requests] == [("silu",)]
    assert not [call for call in done.calls if "to" in call.split()]
    torch.testing.assert_close(done.output, model(X.bfloat16()), rtol=2e-2, atol=2e-2)
    model = Net(lambda net, x: functional.silu(net.linear(x).float()), linear=linear(64, 96, dtype=torch.bfloat16))
    done = lower(model, X.bfloat16(), is_checked=False)
    assert [request.epilogue for request in done.requests] == [()]
    assert done.output.dtype == torch.float32


def test_a_target_that_refuses_a_step_leaves_it_to_inductor(everything):  # noqa: F811
    everything.refused = ("silu",)
    done = lower(net(lambda net, y, z: functional.silu(y) + z), X, normal(2, 3, 96))
    assert [request.epilogue for request in done.requests] == [("bias",)]
    ((_, chosen),) = done.context.chosen
    assert chosen.left == ("silu (everything: no silu)",)
    assert "not fused: silu (everything: no silu)" in str(chosen)


def test_the_reference_fuses_nothing():
    with targets():
        done = lower(net(lambda net, y, z: functional.silu(y) + z), X, normal(2, 3, 96))
    assert [request.epilogue for request in done.requests] == [("bias",)]
    assert done.counts["fuse-epilogue"] == 0


def test_sizes_that_are_not_known_yet():
    model = net(lambda net, y, z: functional.gelu(y) + z)
    done = lower(model, X, normal(2, 3, 96, seed=4), dynamic=True, is_checked=False)
    assert [request.epilogue for request in done.requests] == [("bias", "gelu", "add")]
    torch.testing.assert_close(done.output, model(X, normal(2, 3, 96, seed=4)), rtol=1e-5, atol=1e-5)


def test_a_product_that_multiplies_another_takes_it_as_operand():
    model = Net(lambda net, x, z: functional.silu(net.a(x)) * net.b(z), a=linear(64, 96), b=linear(64, 96, seed=3))
    done = lower(model, X, normal(2, 3, 64, seed=4))
    assert sorted(request.epilogue for request in done.requests) == [(), ("silu", "mul")]
    torch.testing.assert_close(done.output, model(X, normal(2, 3, 64, seed=4)), rtol=1e-5, atol=1e-5)
