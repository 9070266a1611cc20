"""merge-shared-input: which products become one, which do not, and the values."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional

from tests.lower._everything import everything, targets  # noqa: F401
from tests.lower._graphs import lower
from tests.lower._weights import Net, linear, normal, stored
from tests.surrounded import surrounded

pytestmark = pytest.mark.usefixtures("everything")
X = normal(2, 3, 64)


def outs(done):
    return [(request.n, request.epilogue) for request in done.requests]


def heads(net, x):
    return tuple(part(x).view(2, 3, -1, 16).transpose(1, 2) for part in (net.q, net.k, net.v))


def test_query_key_value():
    model = Net(heads, q=linear(64, 64), k=linear(64, 32, seed=3), v=linear(64, 32, seed=4))
    done = lower(model, X)
    assert outs(done) == [(128, ())]
    assert done.counts["merge-shared-input"] == 3
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-5)
    assert_expected_inline(
        done.texts["fuse-input-quantization"],
        """\
x0 = input
v2 = int4g32 [64, 64]: product(x0, [[parts_0, parts_1]], [])
v3 = v2.view(2, 3, -1, 16)
v4 = v3.transpose(1, 2)
v7 = int4g32 [32, 64]: product(x0, [[parts_0, parts_1]], [])
v8 = v7.view(2, 3, -1, 16)
v9 = v8.transpose(1, 2)
v12 = int4g32 [32, 64]: product(x0, [[parts_0, parts_1]], [])
v13 = v12.view(2, 3, -1, 16)
v14 = v13.transpose(1, 2)
return (v4, v9, v14)""",
    )
    assert_expected_inline(
        done.texts["merge-shared-input"],
        """\
x0 = input
v6 = int4g32 [128, 64]: product(x0, [[parts_0, parts_1], [parts_0, parts_1], [parts_0, parts_1]], [])
v7 = getitem(v6, (Ellipsis, 0:64:))
v8 = getitem(v6, (Ellipsis, 64:96:))
v9 = getitem(v6, (Ellipsis, 96:128:))
v10 = v7.reshape(2, 3, -1, 16)
v11 = v10.transpose(1, 2)
v12 = v8.reshape(2, 3, -1, 16)
v13 = v12.transpose(1, 2)
v14 = v9.reshape(2, 3, -1, 16)
v15 = v14.transpose(1, 2)
return (v11, v13, v15)""",
    )


def test_biases_are_merged_with_zeros_for_those_that_have_none():
    model = Net(heads, q=linear(64, 64, bias=True), k=linear(64, 32), v=linear(64, 32, bias=True, seed=4))
    done = lower(model, X)
    assert outs(done) == [(128, ("bias",))]
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate_first", [True, False])
def test_a_gate_comes_first_whatever_the_order(gate_first):
    def gated(net, x):
        if gate_first:
            return net.down(functional.silu(net.gate(x)) * net.up(x))
        up = net.up(x)
        return net.down(up * functional.silu(net.gate(x)))

    model = Net(gated, gate=linear(64, 96), up=linear(64, 96, seed=3), down=linear(96, 64, seed=4))
    done = lower(model, X)
    assert outs(done) == [(192, ("gate_silu",)), (64, ())]
    assert done.context.chosen[0][1].names[0].endswith("gate.weight")
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-5)


def test_attention_and_mlp_on_one_norm_are_merged_apart():
    def parallel(net, x):
        q, v = net.q(x), net.v(x)
        return q @ v.mT, functional.silu(net.gate(x)) * net.up(x), functional.gelu(net.up2(x))

    parts = {name: linear(64, 64, seed=seed) for seed, name in enumerate(("q", "v", "gate", "up", "up2"))}
    model = Net(parallel, **parts)
    done = lower(model, X)
    assert sorted(outs(done)) == [(64, ("gelu",)), (128, ()), (128, ("gate_silu",))]
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-5)


def both(net, x, *more):
    return net.a(x), net.b(x)


def computed_bias(net, x):
    return functional.linear(x, net.a.weight, x[0, 0] * 2), functional.linear(x, net.b.weight, x[0, 1])


def written(net, x):
    x = x * 1
    a = net.a(x)
    x.add_(1)
    return a, net.b(x)


def written_result(net, x):
    a = net.a(x)
    a.view(6, 64).mul_(2)
    return a, net.b(x)


def strided(net, x):
    a = net.a(x) * 2
    return a.as_strided((2, 3, 4), a.stride()), net.b(x)


LEFT = {
    "strides that dynamo saw": (strided, {}, None),
    "another spec": (both, {"b": linear(64, 64, name="int8g32")}, None),
    "another input": (lambda net, x: (net.a(x), net.b(x + 1)), {}, None),
    "one scale for all": (both, {"a": linear(64, 64, name="int8t"), "b": linear(64, 64, name="int8t")}, "one scale"),
    "a bias that is computed": (computed_bias, {}, "a bias is computed"),
    "an input that is written": (written, {}, None),
    "a result that is written": (written_result, {}, "written in place"),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_does_not_fire(case):
    does, members, reason = LEFT[case]
    model = Net(does, **({"a": linear(64, 64), "b": linear(64, 64, seed=3)} | members))
    done = lower(model, X.clone(), is_checked=False)
    assert done.counts["merge-shared-input"] == 0
    left = [line for _, chosen in done.context.chosen for line in chosen.left]
    assert all(reason in line for line in left) if reason else not left
    assert bool(left) == bool(reason)
    torch.testing.assert_close(done.output, model(X.clone()), rtol=1e-5, atol=1e-5)


def test_nine_are_too_many():
    names = "abcdefghi"
    model = Net(
        lambda net, x: [getattr(net, name)(x) for name in names],
        **{name: linear(64, 32, seed=seed) for seed, name in enumerate(names)},
    )
    assert len(outs(lower(model, X))) == 9


def test_the_reference_and_training_merge_nothing():
    model = Net(both, a=linear(64, 64), b=linear(64, 64, seed=3))
    with targets():
        assert lower(model, X).counts["merge-shared-input"] == 0
    x = X.clone().requires_grad_()
    assert len(outs(lower(model, x, needs_grad=True))) == 2


@pytest.mark.parametrize("kind", ["scale", "order", "input rotation", "int8", "static", "output rotation"])
def test_equal_surroundings_are_shared(kind):
    weights = [nn.Parameter(surrounded(kind, (96, 64))[1], requires_grad=False) for _ in range(2)]
    model = Net(lambda net, x: [functional.linear(x, weight) for weight in (net.a, net.b)], a=weights[0], b=weights[1])
    done = lower(model, X)
    assert [request.n for request in done.requests] == [192]
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-4)


def test_other_scales_are_another_input():
    _, first = surrounded("scale", (96, 64))
    other = first.with_parts(first.parts, extras={"input_scale": first.extras["input_scale"] * 2})
    members = {"a": nn.Parameter(first, requires_grad=False), "b": nn.Parameter(other, requires_grad=False)}
    model = Net(lambda net, x: [functional.linear(x, weight) for weight in (net.a, net.b)], **members)
    done = lower(model, X)
    assert [(request.n, request.prologue) for request in done.requests] == [(96, ("scale",))] * 2
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["int4g32z", "nf4g64", "fp8e4m3", "fp8e4m3b32x64", "ternaryg64", "q4_K", "nf4g64dq"])
def test_every_kind_of_parts(name):
    members = {"a": stored((64, 256), name), "b": stored((96, 256), name, seed=3)}
    model = Net(lambda net, x: [functional.linear(x, weight) for weight in (net.a, net.b)], **members)
    done = lower(model, normal(2, 256))
    assert [request.n for request in done.requests] == [160]
    torch.testing.assert_close(done.output, model(normal(2, 256)), rtol=1e-4, atol=1e-4)


def test_a_result_that_is_copied_into_a_cache():
    def cached(net, x, cache):
        k, v = net.a(x).view(2, 3, 4, 16), net.b(x).view(2, 3, 2, 16)
        cache[:, :, :2].copy_(v)
        return k, cache

    model = Net(cached, a=linear(64, 64), b=linear(64, 32, seed=3))
    done = lower(model, X, torch.zeros(2, 3, 4, 16))
    assert [request.n for request in done.requests] == [96]
    torch.testing.assert_close(done.output, model(X, torch.zeros(2, 3, 4, 16)), rtol=1e-5, atol=1e-5)


def test_views_of_a_slice():
    def views(net, x):
        return net.a(x).view(-1), net.b(x).view(2, -1), net.b(x).transpose(0, 1).reshape(-1).view(torch.int32)

    model = Net(views, a=linear(64, 64), b=linear(64, 32, seed=3))
    done = lower(model, X)
    assert [request.n for request in done.requests] == [128]
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-5)
