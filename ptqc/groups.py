"""Scale groups: which channels of which parameters may be rescaled against each other without changing a model.

For a value x and a scale s > 0 per channel, dividing the producer's channels by s and multiplying the columns of every
consumer by s is exact under the rule of `ptqc.passes.groups`. This is the vocabulary: what was found, and how a scale
reaches a parameter.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ScaleGroup", "ScaledParameter", "rescaled", "spread"]


@dataclass(frozen=True, eq=False)
class ScaledParameter:
    """How one parameter changes when channel c of a group is scaled by s[c].

    name: qualified name. axis: the axis of the parameter along which the channels lie, negative. channel: the channel
    of every entry along it, [size] int64, -1 where an entry is left alone. power: entries become
    (offset + w) * s[channel] ** power - offset. offset: 1 for norms that multiply by 1 + w.
    """

    name: str
    axis: int
    channel: Tensor
    power: float
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Consumers that read one value (or values that scale alike), and the producer that can take the scale in.

    value: name of the value in the graph. channels: how many scales there are. kind: "fold" - exact, into `producer`;
    "run-time" - no producer can take it, the consumers' input is multiplied at run time instead; "refused" - neither.
    reason: why it is not a fold, in words for the user; "" for folds. structure: what it is, as in "norm -> linears".
    Consumers multiply their columns by s (power 1); producers have power -1, or -1/k where f(s x) = s^k f(x) lies
    between.
    """

    value: str
    channels: int
    kind: Literal["fold", "run-time", "refused"]
    producer: tuple[ScaledParameter, ...]
    consumers: tuple[ScaledParameter, ...]
    reason: str = ""
    structure: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the consumers' parameters."""
        return tuple(consumer.name for consumer in self.consumers)


def rescaled(weight: Tensor, entry: ScaledParameter, scale: Tensor) -> Tensor:
    """The parameter after its group is scaled.

    weight: the parameter, float. scale: [channels], positive. Returns the same shape and dtype, computed in the wider
    of float32 and the weight's own type.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = spread(scale.to(weight.device, wide), entry.channel) ** entry.power
    shape = [1] * weight.ndim
    shape[entry.axis] = -1
    changed: Tensor = (weight.to(wide) + entry.offset) * factor.view(shape) - entry.offset
    return changed.to(weight.dtype)


def spread(scale: Tensor, channel: Tensor) -> Tensor:
    """The scale of every entry of an axis, [size]; 1 where it has no channel. scale: [channels]. channel: [size]."""
    channel = channel.to(scale.device)
    padded = torch.cat([scale, scale.new_ones(1)])
    return padded[torch.where(channel < 0, len(scale), channel)]
