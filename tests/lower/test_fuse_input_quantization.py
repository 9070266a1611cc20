"""fuse-input-quantization: kernels that quantize their input, whoever would serve the product without."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional

from tests.lower._everything import Everything, everything, targets  # noqa: F401
from tests.lower._graphs import lower
from tests.lower._weights import Net, normal
from tests.surrounded import surrounded

X = normal(2, 3, 64)


def net(kind, count=1, spec="int8g32"):
    made = [nn.Parameter(surrounded(kind, (96, 64), spec)[1], requires_grad=False) for _ in range(count)]
    weights = nn.ParameterList(made)
    return Net(lambda net, x: [functional.silu(functional.linear(x, w)) for w in net.weights], weights=weights)


@pytest.mark.parametrize(
    ("kind", "act", "operands"),
    [("int8", "int8-token", ()), ("static", "int8-tensor-static", ("act_scale",)),
     ("outliers", "int8-token-outlier2.5", ()), ("everything", "int8-token", ("prologue order",))],
)  # fmt: skip
def test_every_act(everything, kind, act, operands):  # noqa: F811
    model = net(kind)
    done = lower(model, X)
    (request,) = done.requests
    assert (str(request.act), request.operands) == (act, operands)
    assert "ptqc.fake_quantize.default" not in done.calls
    torch.testing.assert_close(done.output, model(X), rtol=1e-5, atol=1e-4)


def test_before_and_after(everything):  # noqa: F811
    done = lower(net("static"), X)
    assert_expected_inline(
        done.texts["lower-linears"],
        """\
x0 = input
v1 = ptqc.fake_quantize.default(x0, 'int8-tensor-static', around_0)
v4 = int8g32 [96, 64]: product(v1, [[parts_0, parts_1]], [])
v5 = silu(v4)
return (v5,)""",
    )
    assert_expected_inline(
        done.texts["fuse-input-quantization"],
        """\
x0 = input
v3 = int8g32 [96, 64]: int8-tensor-static > product(x0, [[parts_0, parts_1]], [around_0])
v4 = silu(v3)
return (v4,)""",
    )


class Integers(Everything):
    """Serves quantized inputs only."""

    def refuses(self, request):
        return super().refuses(request) if request.act.dtype else "no floats"


def test_what_follows_is_asked_of_the_kernel_for_integers():
    with targets(integers=Integers()):
        done = lower(net("int8"), X)
    ((_, chosen),) = done.context.chosen
    assert chosen.kernel.target == "integers" and chosen.request.epilogue == ("silu",)


def test_without_such_a_target_the_step_stays(everything):  # noqa: F811
    everything.refused = ("int8-token",)
    done = lower(net("int8"), X)
    assert done.counts["fuse-input-quantization"] == 0
    assert "ptqc.fake_quantize.default" in done.calls
    assert "int8-token (everything: no int8-token; reference:" in str(done.context.chosen[0][1])


def test_products_that_share_an_input_share_its_quantization(everything):  # noqa: F811
    model = Net(
        lambda net, x: [functional.linear(x, weight) for weight in (net.a, net.b)],
        **{name: nn.Parameter(surrounded("int8", (96, 64))[1], requires_grad=False) for name in "ab"},
    )
    everything.refused = ("int8-token",)
    done = lower(model, X)
    assert done.calls.count("ptqc.fake_quantize.default") == 1
    assert [request.n for request in done.requests] == [192]
    assert torch.equal(torch.stack(list(done.output)), torch.stack(model(X)))
