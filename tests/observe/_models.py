"""Small models whose weights are used in one way each."""

import torch
from torch import nn

__all__ = ["Uses", "rows"]


class Uses(nn.Module):
    """One parameter, used as the test says."""

    def __init__(self, shape, use):
        super().__init__()
        self.w, self.use = nn.Parameter(rows(*shape, seed=9)), use

    def forward(self, **inputs):
        return self.use(self.w, **inputs)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
