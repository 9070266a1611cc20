"""Weight operands: what counts as a weight, along which axis, and what is kept for which reason."""

import pytest
import torch
from torch import nn

from ptqc.capture import capture
from ptqc.weights import weight_uses
from tests.uses import uses_of

X = torch.randn(2, 5, 64)
IDS = torch.tensor([[1, 2]])
F = nn.functional
WEIGHTS = [
    ((96, 64), F.linear, -1),
    ((96, 64), lambda x, w: F.linear(x, weight=w), -1),
    ((64, 96), lambda x, w: x @ w, -2),
    ((64, 96), lambda x, w: torch.addmm(x[0, 0, :1].expand(96), x[0], w), -2),
    ((96, 64), lambda x, w: x @ w.t(), -1),
    ((96, 64), lambda x, w: torch.einsum("bti,oi->bto", x, w), -1),
    ((64, 96), lambda x, w: torch.einsum("bti,io->bto", x, w), -2),
    ((4, 96, 64), lambda x, w: torch.bmm(x[:1].expand(4, -1, -1), w.transpose(1, 2)), -1),
    ((4, 64, 96), lambda x, w: torch.bmm(x[:1].expand(4, -1, -1), w), -2),
    ((4, 96, 64), lambda x, w: x @ w[torch.tensor([2, 0])].mT, -1),
    ((96, 64), lambda x, w: F.linear(x, w.to(torch.float64).float()), -1),
    ((96, 64), lambda x, w: F.linear(x, w.chunk(2)[1]), None),
    ((96, 64), lambda x, w: w @ x.mT, -1),
]


@pytest.mark.parametrize("number", range(len(WEIGHTS)))
def test_weights(number):
    shape, use, axis = WEIGHTS[number]
    (found,) = uses_of(shape, use, X)
    assert found.reason is None
    assert found.contractions
    assert axis is None or found.input_axis == axis


KEPT = [
    ((4, 64), lambda x, w: torch.softmax(F.linear(x, w).float(), -1).topk(2).indices, X, "a router"),
    ((32, 64), lambda x, w: F.linear(F.embedding(x, w), w), IDS, "tied to an embedding"),
    ((32, 64), lambda x, w: F.embedding(x, w), IDS, "an embedding"),
    ((1, 64), F.linear, X, "no matrix"),
    ((96, 64), lambda x, w: (x.sum(), w * 2), X, "graph break"),
]


@pytest.mark.parametrize("number", range(len(KEPT)))
def test_kept(number):
    shape, use, x, reason = KEPT[number]
    (found,) = uses_of(shape, use, x)
    assert reason in found.reason


def test_positions_and_norms_are_not_spoken_of():
    assert uses_of((5, 64), lambda x, w: x + w, X) == []
    assert uses_of((5, 64), lambda x, w: F.linear(x, torch.ones(8, 64)) * w.sum(), X) == []


def test_the_projections_of_multi_head_attention_are_weights():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    (graph,) = capture(Attends().eval(), {"x": X})
    found = weight_uses(graph.module.graph, graph.parameters)
    assert sorted((tuple(use.parameter.shape), use.reason, use.input_axis) for use in found) == [
        ((64, 64), None, -1),
        ((192, 64), None, -1),
    ]
