"""Contractions: operands, contracted axes and axes that run together."""

import pytest
import torch
from torch import nn

from ptqc.capture import capture
from ptqc.weights import weight_uses
from tests.uses import uses_of

F = nn.functional
X, STACK = torch.randn(2, 5, 64), torch.randn(4, 5, 64)


def product(shape, use, x):
    (found,) = uses_of(shape, use, x)
    (only,) = found.products
    assert only.node in found.contractions
    return only


CASES = [
    ((96, 64), F.linear, X, (-1, -1, ())),
    ((64, 96), lambda x, w: x @ w, X, (-2, -1, ())),
    ((96, 64), lambda x, w: w @ x.mT, X, (-1, -2, ())),
    ((4, 64, 96), lambda x, w: torch.bmm(x, w), STACK, (-2, -1, ((-3, -3),))),
    ((4, 96, 64), lambda x, w: torch.bmm(w, x.mT), STACK, (-1, -2, ((-3, -3),))),
    ((4, 64, 96), lambda x, w: x[:1] @ w, X, (-2, -1, ())),
    ((4, 64, 96), lambda x, w: x[:, None] @ w, X, (-2, -1, ())),
    ((96, 64), lambda x, w: torch.einsum("bti,oi->bto", x, w), X, (-1, -1, ())),
    ((4, 96, 64), lambda x, w: torch.einsum("eti,eoi->teo", x, w), STACK, (-1, -1, ((-3, -3),))),
    ((64, 96), lambda x, w: torch.addmm(x[0, 0, :1], x[0], w), X, (-2, -1, ())),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_contractions(number):
    shape, use, x, expected = CASES[number]
    found = product(shape, use, x)
    assert (found.axis, found.input_axis, found.pairs) == expected
    assert found.input is not None and found.reason is None


@pytest.mark.parametrize(
    ("shape", "use", "reason"),
    [
        ((5, 64, 96), lambda x, w: torch.einsum("bti,tio->bo", x, w), "does not sum over exactly one of its axes"),
        ((96, 64), lambda x, w: torch.einsum("bti,oi->bo", x, w), "sums over an axis of one operand alone"),
        ((96, 64), lambda x, w: torch.einsum("...i,oi->...o", x, w), "letters alone"),
    ],
)
def test_what_cannot_be_told_has_a_reason(shape, use, reason):
    assert reason in product(shape, use, X).reason


def test_attention_has_a_contraction_for_each_input():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x, y):
            return self.attention(x, y, y, need_weights=False)[0]

    (graph,) = capture(Attends().eval(), {"x": X, "y": X + 1})
    packed, out = sorted(weight_uses(graph.module.graph, graph.parameters), key=lambda use: -use.parameter.shape[0])
    assert len(packed.products) == 2 and len({one.input for one in packed.products}) == 2
    assert [one.reason for one in out.products] == ["its input is computed inside multi_head_attention_forward"]
