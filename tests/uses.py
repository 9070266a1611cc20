"""A module with one parameter and one way to use it, captured."""

import torch
from torch import nn

from ptqc.capture import capture
from ptqc.weights import weight_uses


class Uses(nn.Module):
    """Holds `w` of a shape; `use(x, w)` is its forward."""

    def __init__(self, shape, use):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x):
        return self.use(x, self.w)


def uses_of(shape, use, x):
    """What `weight_uses` finds in its one graph."""
    (graph,) = capture(Uses(shape, use).eval(), {"x": x})
    return weight_uses(graph.module.graph, graph.parameters)
