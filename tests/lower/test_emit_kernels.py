"""emit-kernels: weights are prepared once for all graphs, and nothing that is not read stays."""

import gc

import pytest
import torch
from torch.nn import functional

from ptqc.passes.lower import prepared as prepared_weights
from tests.lower._everything import everything  # noqa: F401
from tests.lower._graphs import lower
from tests.lower._weights import Net, linear, normal

pytestmark = pytest.mark.usefixtures("everything")


def model():
    return Net(lambda net, x: (net.a(x), net.b(x)), a=linear(64, 64), b=linear(64, 32, seed=3))


def prepared(done):
    (call,) = [node for node in done.module.graph.nodes if str(node.target).startswith("ptqc.k_")]
    return [getattr(done.module, str(part.target)) for part in call.args[1]]


def test_graphs_of_one_model_share_prepared_weights():
    net = model()
    first, second = lower(net, normal(2, 64)), lower(net, normal(5, 64))
    assert all(a is b for a, b in zip(prepared(first), prepared(second), strict=True))
    other = lower(model(), normal(2, 64))
    assert not any(a is b for a, b in zip(prepared(first), prepared(other), strict=True))


def test_prepared_weights_die_with_their_graphs():
    net = model()
    first = lower(net, normal(2, 64))
    ((_, references),) = prepared_weights._prepared[net.a.weight].values()
    assert all(reference() is not None for reference in references)
    del first
    torch._dynamo.reset()
    gc.collect()
    assert all(reference() is None for reference in references)
    lower(net, normal(2, 64))


def test_only_what_the_graph_reads_stays():
    done = lower(model(), normal(2, 64))
    tensors = dict(done.module.named_buffers()) | dict(done.module.named_parameters())
    read = {str(node.target) for node in done.module.graph.nodes if node.op == "get_attr"}
    assert set(tensors) == read == {"product_2_everything_0", "product_2_everything_1"}
    assert not done.context.sites


def test_the_request_tells_everything():
    net = Net(lambda net, x: functional.silu(net.a(x)), a=linear(64, 96, bias=True))
    ((site, chosen),) = lower(net, normal(2, 64), exact=True).context.chosen
    assert chosen.request.exact
    assert str(chosen).endswith("int4g32 [96, 64] float32 cpu exact: product > bias > silu -> everything")
    assert chosen.names == site.names == ("a.weight",)


def test_no_gradient_flows_through_kernels():
    net = Net(lambda net, x: functional.silu(net.a(x)), a=linear(64, 96))
    done = lower(net, normal(2, 64).requires_grad_(), needs_grad=True)
    assert "everything: no derivatives" in str(done.context.chosen[0][1])
    assert done.calls[0] == "ptqc.linear.default"


def test_without_a_derivative_to_be_had_kernels_serve_with_gradients_enabled():
    net = Net(lambda net, x, y: (net.a(x), net.b(y)), a=linear(64, 96), b=linear(64, 96, bias=True))
    done = lower(net, normal(2, 64), normal(2, 64).requires_grad_(), needs_grad=True)
    assert [chosen.kernel.target for _, chosen in done.context.chosen] == ["everything", "reference"]
    net.a.bias = torch.nn.Parameter(torch.ones(96))
    done = lower(net, normal(2, 64), normal(2, 64), needs_grad=True)
    assert [chosen.kernel.target for _, chosen in done.context.chosen] == ["reference", "everything"]


def test_every_graph_on_the_way_can_be_run_alone():
    net = Net(lambda net, x: functional.gelu(net.a(x)) + x, a=linear(64, 64, bias=True))
    texts = lower(net, normal(2, 64)).texts
    assert list(texts)[-2:] == ["emit-kernels", "lower-attention"]
    assert len(set(texts.values())) >= 4
