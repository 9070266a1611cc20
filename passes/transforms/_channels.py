"""From columns of weights to channels of a scale group; `ptqc.groups.spread` leads back.

The columns of a member belong to channels: often to one each, several to one where heads are shared (grouped-query
attention), some to none (-1). All functions take the channel of every column, [in] int64.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ptqc.transforms import Member

__all__ = ["averaged", "bounded", "channels_of", "largest"]

_FARTHEST = 1e4
"""A channel is scaled by no more than this against the geometric mean of all."""


def channels_of(member: Member) -> Tensor:
    """The channel of every column of a member, [in]; its own position where the member does not say."""
    if member.channel is not None:
        return member.channel.to(member.weight.device)
    return torch.arange(member.weight.shape[-1], device=member.weight.device)


def averaged(columns: Iterable[tuple[Tensor, Tensor]], channels: int) -> Tensor:
    """The mean over the columns of each channel, [channels]; 0 for channels without one. columns: (values, channel)."""
    total = count = torch.zeros(0)
    for values, channel in columns:
        if not len(total):
            total, count = values.new_zeros(channels), values.new_zeros(channels)
        has = channel >= 0
        total.index_add_(0, channel[has], values[has])
        count.index_add_(0, channel[has], torch.ones_like(values[has]))
    return total / count.clamp_min(1)


def largest(columns: Iterable[tuple[Tensor, Tensor]], channels: int) -> Tensor:
    """The maximum over the columns of each channel, [channels], of values of at least 0. columns: (values, channel)."""
    found = torch.zeros(0)
    for values, channel in columns:
        found = found if len(found) else values.new_zeros(channels)
        has = channel >= 0
        found.scatter_reduce_(0, channel[has], values[has], "amax")
    return found


def bounded(scale: Tensor, is_alive: Tensor) -> Tensor:
    """A scale whose live channels have geometric mean 1 and stay within bounds; 1 for the others.

    scale: [channels]; whatever it holds for dead channels is ignored.
    """
    is_alive = is_alive & torch.isfinite(scale) & (scale > 0)
    if not bool(is_alive.any()):
        return torch.ones_like(scale)
    logarithm = torch.where(is_alive, scale, 1.0).double().log()
    centred = logarithm - logarithm.sum() / is_alive.sum()
    return torch.where(is_alive, centred.exp().clamp(1 / _FARTHEST, _FARTHEST), 1.0).to(scale.dtype)
