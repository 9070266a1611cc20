"""Models whose weights are stored."""

import torch
from torch import nn

from ptqc.methods import METHODS, quantize_weight
from ptqc.spec import WeightSpec


def stored(shape, name="int4g32", seed=2, dtype=torch.float32, is_transposed=False):
    """A parameter of a shape, rounded to a spec."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    made = quantize_weight(weight, METHODS.get("rtn")(), WeightSpec.parse(name), is_transposed=is_transposed)
    return nn.Parameter(made, requires_grad=False)


def linear(into, out, bias=False, name="int4g32", seed=2, dtype=torch.float32):
    """A linear with a stored weight."""
    made = nn.Linear(into, out, bias=bias, dtype=dtype).requires_grad_(False)
    if bias:
        made.bias.copy_(torch.randn(out, generator=torch.Generator().manual_seed(seed)).to(dtype))
    made.weight = stored((out, into), name, seed, dtype)
    return made


class Net(nn.Module):
    """Modules and tensors by name, and a function of the net and its inputs."""

    def __init__(self, forward, **members):
        super().__init__()
        self.does = forward
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *inputs):
        return self.does(self, *inputs)


def normal(*shape, seed=0, dtype=torch.float32):
    """A seeded random tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
