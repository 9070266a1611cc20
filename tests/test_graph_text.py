"""The text of a graph: the same for the same graph, whatever its nodes are called."""

import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ptqc.graph_text import graph_text


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x, y=None):
        z = torch.add(self.linear(x) * self.scale, 1.5, alpha=2)
        return {"out": z.view(-1, 3)[:, 1:], "pair": (z,)}


def test_modules_functions_and_methods():
    assert_expected_inline(
        graph_text(fx.symbolic_trace(Model())),
        """\
x = input
y = input
v0 = self.linear(x)
v1 = self.scale
v2 = mul(v0, v1)
v3 = add(v2, 1.5, alpha=2)
v4 = v3.view(-1, 3)
v5 = getitem(v4, (::, 1::))
return {out: v5, pair: (v3,)}""",
    )


def test_aten_operators_and_names_that_do_not_matter():
    module = make_fx(lambda a, b: (torch.mm(a, b).relu(), [a]))(torch.ones(2, 2), torch.ones(2, 2))
    text = graph_text(module)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.name = f"other_{node.name}"
    assert graph_text(module) == text
    assert "v0 = aten.mm.default(a_1, b_1)" in text
    assert "v1 = aten.relu.default(v0)" in text
