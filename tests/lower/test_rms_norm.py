"""Reading RMS norms: the spellings of real models, and what only looks like one."""

import operator

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from ptqc.passes.lower.rms_norm import rms_norm_of

G = nn.Parameter(torch.linspace(0.5, 2, 64))


def called(x, g):
    return torch.rms_norm(x, (64,), g, 1e-5)


def llama(x, g):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return g * h.to(x.dtype)


def gemma(x, g):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (h * (1.0 + g.float())).type_as(x)


def t5(x, g):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return g * (x * torch.rsqrt(variance + 1e-5))


def squared(x, g):
    return x * torch.rsqrt(1e-5 + (x * x).mean(dim=-1, keepdim=True)) * g


def divided(x, g):
    return g * (x / torch.sqrt(torch.mean(torch.square(x), -1, True) + 1e-5))


def without_gain(x, g):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class _Graph(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.does, self.g = does, G

    def forward(self, x):
        return self.does(x, self.g)


def read(does, dtype=torch.float32):
    """The norm that the output of a traced function is read as, and the node of x."""
    module = fx.symbolic_trace(_Graph(does))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        interpreter = fx.Interpreter(module)
        x = mode.from_tensor(torch.ones(2, 64, dtype=dtype))
        original = interpreter.run_node

        def keep(node):
            node.meta["example_value"] = original(node)
            return node.meta["example_value"]

        interpreter.run_node = keep
        interpreter.run(x)
    placeholder, *_, output = module.graph.nodes
    return rms_norm_of(output.args[0]), placeholder


@pytest.mark.parametrize("does", [called, llama, gemma, t5, squared, divided, without_gain])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings(does, dtype):
    norm, x = read(does, dtype)
    assert norm is not None and norm.h is x and norm.eps == 1e-5
    assert norm.gain.offset == {gemma: 1.0, without_gain: 1.0}.get(does, 0.0)
    assert (norm.gain.parameter is None) == (does is without_gain)


OTHERS = {
    "another mean": lambda x, g: g * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5)),
    "a cube": lambda x, g: g * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5)),
    "over rows": lambda x, g: g * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5)),
    "a sum": lambda x, g: g * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5)),
    "a gain that is computed": lambda x, g: x[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "multiplied by the root": lambda x, g: g * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "divided by the inverse": lambda x, g: g * (x / torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "a LayerNorm": lambda x, g: torch.layer_norm(x, (64,), g, None, 1e-5),
    "of two axes": lambda x, g: torch.rms_norm(x, (2, 64), None, 1e-5),
    "an integer": lambda x, g: operator.mul(g, x),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_norm(case):
    assert read(OTHERS[case])[0] is None
