"""insert-observers: which values are observed, in both kinds of graphs, and what the statistics are."""

import pytest
import torch
from torch import nn

from ptqc.capture import capture
from ptqc.passes.observe.insert_observers import InsertObservers
from ptqc.passes.observe.recorder import Recorder
from ptqc.passes.observe.run import observed_graph
from ptqc.pipeline import Context, Pipeline
from ptqc.program import program
from ptqc.statistics import STATISTICS
from tests.observe._models import Uses, rows

F = nn.functional
X = rows(2, 5, 64)
STACK = rows(4, 5, 64, seed=1)
IDS = torch.tensor([2, 0, 2, 1, 3, 2, 0])
ROUTED = rows(7, 64, seed=2)


def observed(model, batch, kind):
    """(graph, recorder) after running the model's graph of one kind on the batch."""
    recorder = Recorder(dict.fromkeys(model.parameters(), STATISTICS))
    (captured,) = capture(model, batch)
    if kind == "dynamo":
        module, arguments = observed_graph(captured.module, captured.values, recorder), list(captured.values)
    else:
        traced = program(captured, model, batch)
        module, arguments = traced.module, traced.arguments(batch)
        context = Context(lambda request: pytest.fail("no kernel is asked for"))
        Pipeline([InsertObservers(traced.parameters, recorder)]).run(module, context)
    recorder.begin(0, batch)
    with torch.no_grad():
        outputs = module(*arguments)
        torch.testing.assert_close(outputs[0], model(**batch))
    return module.graph, recorder


def second_moment(x):
    flat = x.reshape(-1, x.shape[-1]).double()
    return (flat.T @ flat / max(len(flat), 1)).float()


def of_experts(index, x=ROUTED):
    return torch.stack([second_moment(x[index == expert]) for expert in range(4)])


def bmm_of_ids(w, x, ids):
    return torch.bmm(x[:, None], w[ids].mT)[:, 0]


# name -> (shape, use(w, ...), batch, the hessian)
CASES = {
    "linear": ((96, 64), lambda w, x: F.linear(x, w), {"x": X}, second_moment(X)),
    "addmm": ((64, 96), lambda w, x: torch.addmm(x[0, 0, :1], x[0], w), {"x": X}, second_moment(X[0])),
    "matmul": ((64, 96), lambda w, x: x @ w, {"x": X}, second_moment(X)),
    "left operand": ((96, 64), lambda w, x: w @ x.mT, {"x": X}, second_moment(X)),
    "transposed by rows": ((96, 5), lambda w, x: w @ x, {"x": X}, second_moment(X.mT)),
    "einsum": ((96, 64), lambda w, x: torch.einsum("bti,oi->bto", x, w), {"x": X}, second_moment(X)),
    "cast": ((96, 64), lambda w, x: F.linear(x.double(), w.double()), {"x": X}, second_moment(X)),
    "rows of a fused weight": ((96, 64), lambda w, x: F.linear(x, w.chunk(2)[1]), {"x": X}, second_moment(X)),
    "bmm of a stack": (
        (4, 64, 96),
        lambda w, x: torch.bmm(x, w),
        {"x": STACK},
        torch.stack([second_moment(x) for x in STACK]),
    ),
    "einsum of a stack": (
        (4, 96, 64),
        lambda w, x: torch.einsum("eti,eoi->teo", x, w),
        {"x": STACK},
        torch.stack([second_moment(x) for x in STACK]),
    ),
    "every expert": (
        (4, 64, 96),
        lambda w, x: x[:, None] @ w,
        {"x": X},
        second_moment(X).expand(4, 64, 64),
    ),
    "one expert": (
        (4, 96, 64),
        lambda w, x: F.linear(x, w[1]) + F.linear(2 * x, w[-1]),
        {"x": X},
        second_moment(X) * torch.tensor([0.0, 1, 0, 4])[:, None, None],
    ),
    "chosen experts": ((4, 96, 64), bmm_of_ids, {"x": ROUTED, "ids": IDS}, of_experts(IDS)),
    "chosen experts, experts on the left": (
        (4, 96, 64),
        lambda w, x, ids: torch.bmm(w[ids], x[..., None])[..., 0],
        {"x": ROUTED, "ids": IDS},
        of_experts(IDS),
    ),
    "several experts a row": (
        (4, 96, 64),
        lambda w, x, ids: torch.einsum("ni,nkoi->nko", x, w[ids]),
        {"x": ROUTED, "ids": torch.stack([IDS, (IDS + 1) % 4], 1)},
        torch.stack([second_moment(ROUTED[(IDS - e) * ((IDS + 1) % 4 - e) == 0]) for e in range(4)]),
    ),
}


@pytest.mark.parametrize("kind", ["dynamo", "aten"])
@pytest.mark.parametrize("name", CASES)
def test_hessians(name, kind):
    shape, use, batch, expected = CASES[name]
    model = Uses(shape, use).eval()
    _, recorder = observed(model, batch, kind)
    assert recorder.reason(model.w) is None
    torch.testing.assert_close(recorder.statistics(model.w)["hessian"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamo", "aten"])
def test_grouped_products(kind):
    from transformers.integrations.moe import _grouped_mm

    order = IDS.argsort(stable=True)
    ends = torch.bincount(IDS, minlength=4).cumsum(0).int()
    model = Uses((4, 96, 64), lambda w, x, offs: _grouped_mm(x, w.mT, offs)).eval()
    _, recorder = observed(model, {"x": ROUTED[order], "offs": ends}, kind)
    torch.testing.assert_close(recorder.statistics(model.w)["hessian"], of_experts(IDS), rtol=1e-4, atol=1e-4)
    assert recorder.coverage(model.w).tolist() == [2, 1, 3, 1]


class Attention(nn.Module):
    """Three projections of one value, by way of views, and one of another value."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, size, bias=False) for size in (64, 32, 32))
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        mixed = self.q(x) + self.k(x.view(-1, 64)).view(2, 5, 32).repeat(1, 1, 2) + self.v(x).repeat(1, 1, 2)
        return self.out(mixed)


@pytest.mark.parametrize("kind", ["dynamo", "aten"])
def test_weights_that_read_one_value_share_an_observer(kind):
    model = Attention().eval()
    graph, recorder = observed(model, {"x": X}, kind)
    watched = [node for node in graph.nodes if node.op == "call_module"]
    assert [(str(node.target), len(node.args) - 2) for node in watched] == [("observe_0", 3), ("observe_1", 1)]
    q, k, v, out = (layer.weight for layer in (model.q, model.k, model.v, model.out))
    assert recorder.key(q) == recorder.key(k) == recorder.key(v) != recorder.key(out)
    assert recorder.statistics(q) is recorder.statistics(v)
    graph.eliminate_dead_code()
    assert sum(node.op == "call_module" for node in graph.nodes) == 2


@pytest.mark.parametrize("kind", ["dynamo", "aten"])
def test_a_weight_used_twice_has_the_statistics_of_both_values(kind):
    model = Uses((64, 64), lambda w, x: F.linear(F.linear(x, w), w)).eval()
    _, recorder = observed(model, {"x": X}, kind)
    both = torch.cat([X, F.linear(X, model.w)]).detach()
    torch.testing.assert_close(recorder.statistics(model.w)["hessian"], second_moment(both), rtol=1e-4, atol=1e-3)
    assert float(recorder.statistics(model.w)["count"]) == 20


def test_a_value_that_changes_in_place_is_observed_each_time():
    def use(w, x):
        y = x * 1
        first = F.linear(y, w)
        y.mul_(3)
        return first + F.linear(y, w)

    model = Uses((96, 64), use).eval()
    _, recorder = observed(model, {"x": X}, "dynamo")
    torch.testing.assert_close(recorder.statistics(model.w)["hessian"], second_moment(X) * 5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "use", "reason"),
    [
        ((96, 64), lambda w, x: F.linear(x[..., :32], w[:, :32]), "only a part of its inputs"),
        ((4, 96, 64), lambda w, x: x[:, None] @ w[1:3].mT, "only some of its experts"),
        ((5, 64, 96), lambda w, x: torch.einsum("bti,tio->bo", x, w), "does not sum over exactly one"),
        ((4, 64, 96), lambda w, x: x[:, None] @ w.cumsum(0), "cannot be followed"),
    ],
)
def test_what_cannot_be_observed_has_a_reason(shape, use, reason):
    model = Uses(shape, use).eval()
    _, recorder = observed(model, {"x": X}, "dynamo")
    assert reason in recorder.reason(model.w)


def test_only_wanted_weights_are_observed():
    model = Attention().eval()
    (captured,) = capture(model, {"x": X})
    traced = program(captured, model, {"x": X})
    wanted = {node for node, name in traced.names.items() if name == "out.weight"}
    recorder = Recorder({model.out.weight: {"hessian"}})
    assert InsertObservers(traced.parameters, recorder, wanted).run(traced.module, None) == 1
    nothing = {node: weight for node, weight in traced.parameters.items() if weight.ndim < 2}
    assert InsertObservers(nothing, recorder).run(traced.module, None) == 0
