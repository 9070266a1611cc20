"""Views of parameters: axes followed through both kinds of graphs."""

import pytest
import torch
from torch import nn

from ptqc.capture import capture
from ptqc.program import program
from ptqc.views import Axis, View, view_of

EXPERT, OUT, IN = range(3)
WHOLE = [Axis(axis) for axis in range(3)]
IDS = torch.tensor([2, 0, 1, 1, 3])


def picked(axis, index, *axes):
    return View(tuple(axes), ((axis, index),))


# name -> (function of a [4, 6, 8] parameter, its view)
CASES = {
    "itself": (lambda w: w.to(torch.float64), View(tuple(WHOLE))),
    "mT": (lambda w: w.mT.contiguous(), View((WHOLE[EXPERT], WHOLE[IN], WHOLE[OUT]))),
    "transpose": (lambda w: w.transpose(0, -1), View((WHOLE[IN], WHOLE[OUT], WHOLE[EXPERT]))),
    "permute": (lambda w: w.permute(2, 0, 1), View((WHOLE[IN], WHOLE[EXPERT], WHOLE[OUT]))),
    "number": (lambda w: w[2], picked(EXPERT, 2, WHOLE[OUT], WHOLE[IN])),
    "number from the end": (lambda w: w.select(0, -1), picked(EXPERT, 3, WHOLE[OUT], WHOLE[IN])),
    "unbind": (lambda w: w.unbind(0)[1].t(), picked(EXPERT, 1, WHOLE[IN], WHOLE[OUT])),
    "chunk": (lambda w: w.chunk(2, dim=1)[1], View((WHOLE[EXPERT], Axis(OUT, False), WHOLE[IN]))),
    "slice": (lambda w: w[:, ::2], View((WHOLE[EXPERT], Axis(OUT, False), WHOLE[IN]))),
    "slice at the end": (lambda w: w[..., 1:], View((WHOLE[EXPERT], WHOLE[OUT], Axis(IN, False)))),
    "unsqueeze": (lambda w: w[0].unsqueeze(0), picked(EXPERT, 0, Axis(), WHOLE[OUT], WHOLE[IN])),
    "merged": (lambda w: w.view(24, 8), View((Axis(None, False), WHOLE[IN]))),
    "split axis": (
        lambda w: w.view(4, 6, 2, 4),
        View((WHOLE[EXPERT], WHOLE[OUT], Axis(None, False), Axis(None, False))),
    ),
    "pointwise": (lambda w: w * 2, View(tuple(WHOLE))),
}


class Returns(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(4, 6, 8)), use

    def forward(self, x):
        return self.use(self.w) + 0 * x.sum()


def graphs(use):
    """(kind, the node that `use` made, the parameter's placeholder)"""
    model, batch = Returns(use), {"x": torch.ones(1)}
    (captured,) = capture(model, batch)
    traced = program(captured, model, batch)
    for kind, graph, placeholders in (
        ("dynamo", captured.module.graph, captured.parameters),
        ("aten", traced.graph, traced.parameters),
    ):
        (output,) = (node for node in graph.nodes if node.op == "output")
        added = output.args[0][0] if isinstance(output.args[0], (list, tuple)) else output.args[0]
        yield kind, added.args[0], next(iter(placeholders))


@pytest.mark.parametrize("name", CASES)
def test_views(name):
    use, expected = CASES[name]
    for kind, node, parameter in graphs(use):
        assert view_of(node, parameter) == expected, kind


@pytest.mark.parametrize("use", [lambda w: w[IDS.to(w.device)].mT, lambda w: w.index_select(0, IDS).mT])
def test_gathers_name_their_index(use):
    for kind, node, parameter in graphs(use):
        found = view_of(node, parameter)
        assert [axis.of for axis in found.axes] == [EXPERT, IN, OUT], kind
        assert found.axes[0].index is not None and not found.axes[0].is_whole


@pytest.mark.parametrize("use", [lambda w: w.flip(0), lambda w: w.cumsum(0), lambda w: w[w > 0]])
def test_what_is_not_followed_is_no_view(use):
    try:
        found = list(graphs(use))
    except Exception:
        pytest.skip("the graph breaks")
    for _, node, parameter in found:
        assert view_of(node, parameter) is None
