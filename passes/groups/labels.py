"""Labels: which channel's scale every element of a value carries.

A label tensor has the value's shape: labels[e] is the channel whose scale multiplies element e, `UNSCALED` where none
does, `ZERO` where the element is exactly zero and so fits any scale. Axes along which nothing changes have stride 0, so
that a label tensor takes the memory of a vector; `compact` is the same tensor with those axes cut to size 1.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["UNSCALED", "ZERO", "Scaled", "along", "compact", "disagreeing", "largest", "shrunk"]

UNSCALED = -1
ZERO = -2


@dataclass(frozen=True, eq=False)
class Scaled:
    """A value whose element e is multiplied by t[labels[e]] ** degree. labels: int32, the value's shape."""

    labels: Tensor
    degree: Fraction

    @property
    def is_scaled(self) -> bool:
        """Whether any element carries a channel."""
        return self.labels.numel() > 0 and int(compact(self.labels).max()) >= 0


def along(channel: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Labels of a value of `shape` whose channels lie along one axis. channel: [shape[axis]]."""
    view = [1] * len(shape)
    view[axis] = -1
    return channel.view(view).expand(shape)


def compact(labels: Tensor) -> Tensor:
    """The labels with every axis of stride 0 cut to size 1."""
    for axis in range(labels.ndim):
        if labels.stride(axis) == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def largest(labels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """One label for each row along an axis, and the labels (1-D) of the rows in which it is not the only one.

    Returns the labels compact and with `axis` cut to size 1. Zeros agree with everything.
    """
    small = compact(labels)
    if small.shape[axis] == 1:
        return small, small.new_empty(0)
    top = small.amax(axis, keepdim=True)
    differs = (small != top) & (small != ZERO)
    if not bool(differs.any()):
        return top, small.new_empty(0)
    return top, torch.cat([small[differs], top[differs.any(axis, keepdim=True)]])


def shrunk(labels: Tensor) -> Tensor:
    """The labels with every axis along which they do not vary cut to size 1."""
    small = compact(labels)
    for axis in range(small.ndim):
        if small.shape[axis] > 1 and bool((small == small.narrow(axis, 0, 1)).all()):
            small = small.narrow(axis, 0, 1)
    return small


def disagreeing(one: Tensor, other: Tensor) -> Tensor:
    """Where two label tensors (compact, broadcast against each other) differ, zeros apart."""
    return (one != other) & (one != ZERO) & (other != ZERO)
