"""Unlift: parameters become attributes of a copy, inputs and buffers stay inputs."""

import torch
from torch import nn

from ptqc.passes.lower.unlift import unlift


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.linear(x) + self.count


def test_the_copy_computes_the_same_and_the_original_is_untouched():
    seen = {}

    def backend(gm, inputs):
        before = str(gm.graph)
        graph = unlift(gm, inputs)
        assert str(gm.graph) == before
        seen["names"] = sorted(graph.names.values())
        seen["kinds"] = [node.op for node in graph.module.graph.nodes if node.op in ("get_attr", "placeholder")]
        return lambda *arguments: graph.module(*[arguments[i] for i in graph.kept])

    model, x = Buffered(), torch.randn(2, 8)
    expected = model.linear(x) + 1
    assert torch.equal(torch.compile(model, backend=backend)(x), expected)
    assert seen["names"] == ["linear.bias", "linear.weight"]
    assert sorted(seen["kinds"]) == ["get_attr", "get_attr", "placeholder", "placeholder"]
    assert model.count == 1
