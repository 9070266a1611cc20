"""Small models with the structures that scale groups are found in, and what every test does with them."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptqc.capture import capture
from ptqc.groups import ScaleGroup
from ptqc.passes.groups.check import verify
from ptqc.passes.groups.find import find_groups
from ptqc.program import program

WIDTH = 16


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight)."""

    def __init__(self, width: int = WIDTH, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.offset + self.weight.float()) if self.offset else self.weight * x


class Model(nn.Module):
    """Copies of modules by name, and a function of them and x: [2, 8, 16]."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, copy.deepcopy(part))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def linear(inputs: int = WIDTH, outputs: int = WIDTH, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int = 4, kv_heads: int = 4) -> Tensor:
    """Causal attention over [2, 8, heads * 4]; key and value heads are repeated."""

    def split(x: Tensor, count: int) -> Tensor:
        x = x.view(2, 8, count, 4).transpose(1, 2)
        repeat = heads // count
        return x[:, :, None].expand(2, count, repeat, 8, 4).reshape(2, heads, 8, 4)

    out = F.scaled_dot_product_attention(split(q, heads), split(k, kv_heads), split(v, kv_heads), is_causal=True)
    return out.transpose(1, 2).reshape(2, 8, heads * 4)


def groups_of(model: nn.Module) -> list[ScaleGroup]:
    """The groups of a model on random input; every parameter is drawn anew, every fold is checked."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    model.eval()
    batch = {"x": torch.randn(2, 8, WIDTH)}
    groups = find_groups([program(graph, model, batch) for graph in capture(model, batch)])
    folds = [group for group in groups if group.kind == "fold"]
    scales = [torch.rand(group.channels, dtype=torch.float64) * 1.5 + 0.5 for group in folds]
    for group, error in zip(folds, verify(model, batch, folds, scales), strict=True):
        assert error <= 1e-9, (group.structure, group.names, error)
    return groups


def kinds(model: nn.Module) -> dict[frozenset[str], str]:
    """The consumers of every group -> its kind."""
    return {frozenset(name.removesuffix(".weight") for name in group.names): group.kind for group in groups_of(model)}
