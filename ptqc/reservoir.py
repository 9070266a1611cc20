"""A fixed number of rows drawn at seeded random from a stream, the same ones however the stream is split.

Priority sampling: every row has a number, a hash of (seed, number) is its priority, and the rows of smallest priority
stay. Whether a row stays depends on no other row but those of smaller priority, so merging two reservoirs is exact:
the result is that of the whole stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Reservoir", "priorities", "row_numbers"]

_ROWS_OF_A_BATCH = 1 << 40
_MASK = (1 << 63) - 1


def row_numbers(batch: int, first: int, count: int) -> Tensor:
    """Numbers of `count` rows of a batch from its row `first` on, [count] int64, unique over all batches."""
    return torch.arange(first, first + count) + batch * _ROWS_OF_A_BATCH


def priorities(numbers: Tensor, seed: int) -> Tensor:
    """A hash of each number and the seed, [n] int64, not negative: the finalizer of SplitMix64 (Steele et al. 2014)."""
    value = numbers * -7046029254386353131 + seed * -4658895280553007687 % (1 << 62)
    value = (value ^ _shifted(value, 30)) * -4658895280553007687
    value = (value ^ _shifted(value, 27)) * -7723592293110705685
    return (value ^ _shifted(value, 31)) & _MASK


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class Reservoir:
    """The rows of smallest priority so far. rows: [n, in] float32, in order of priority; priority: [n] int64."""

    capacity: int
    rows: Tensor
    priority: Tensor

    @staticmethod
    def empty(capacity: int, features: int, device: torch.device | None = None) -> "Reservoir":
        """One that holds no rows yet."""
        return Reservoir(
            capacity, torch.zeros(0, features, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        )

    def add(self, rows: Tensor, priority: Tensor) -> None:
        """Offer rows [n, in] of any float type with their priorities [n]."""
        if len(self.priority) == self.capacity:
            better = priority < self.priority[-1]
            rows, priority = rows[better], priority[better]
        if not len(priority):
            return
        chosen = priority.argsort()[: self.capacity]
        merged = torch.cat([self.priority, priority[chosen]])
        order = merged.argsort(stable=True)[: self.capacity]
        self.rows = torch.cat([self.rows, rows[chosen].float()])[order]
        self.priority = merged[order]

    def merge(self, other: "Reservoir") -> None:
        """Take in another reservoir of the same seed."""
        self.add(other.rows.to(self.rows.device), other.priority.to(self.priority.device))

    def quantile(self, fraction: float) -> Tensor:
        """The quantile of |x| of every column, [in] float32, linearly interpolated; zeros without rows."""
        if not len(self.rows):
            return self.rows.new_zeros(self.rows.shape[1])
        ordered = self.rows.abs().sort(dim=0).values
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return torch.lerp(ordered[low], ordered[high], place - low)

    @staticmethod
    def stacked(reservoirs: Sequence["Reservoir"]) -> Tensor:
        """Rows of several reservoirs, [len, n, in]; those with fewer rows are filled up with zeros."""
        longest = max(len(reservoir.rows) for reservoir in reservoirs)
        first = reservoirs[0].rows
        stack = first.new_zeros(len(reservoirs), longest, first.shape[1])
        for place, reservoir in zip(stack, reservoirs, strict=True):
            place[: len(reservoir.rows)] = reservoir.rows
        return stack
