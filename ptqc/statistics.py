"""Statistics of the input x [rows, in] of a weight, gathered batch by batch and merged exactly.

    hessian     [*lead, in, in]  mean over rows of x xT
    absmax      [*lead, in]      largest |x|
    mean_abs    [*lead, in]      mean |x|
    mean        [*lead, in]      mean x
    mean_square [*lead, in]      mean x^2, the diagonal of the hessian without the rest of it
    percentile  [*lead, in]      99.9th percentile of |x|, from the reservoir
    rows        [*lead, n, in]   a seeded sample of at most 512 rows
    count       [*lead]          rows seen

All are float32. `lead` is () for a matrix and (experts,) for a stack, whose experts see rows of their own; the sample
of an expert with fewer rows than the others is filled up with zero rows, which weigh nothing in an output error.

The sum of x xT is held in float32 and fed with float32 products of at most 2048 rows. After 65536 rows of 1024
features in steps of 512, its error against float64 is 1e-6 of sqrt(H_ii H_jj), four orders below the damping that
methods add; a float64 sum has 4e-8, for twice the memory (measured 2026-11, 2 cores, torch 2.13).
"""

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ptqc.errors import PtqcError
from ptqc.reservoir import Reservoir, priorities, row_numbers

__all__ = ["STATISTICS", "Statistics"]

STATISTICS = frozenset({"hessian", "absmax", "mean_abs", "mean", "mean_square", "percentile", "rows", "count"})
"""Every name that a method or transform may ask for."""

_BLOCK = 2048
_TILE = 256
_ROWS = 512
_ROWS_OF_A_STACK = 4096
_PERCENTILE = 0.999


class Statistics:
    """Sums over the rows of one input value (or one per expert), from which the statistics are made.

    count: [experts] int64 and absmax: [experts, in] are always there; sum and sum_abs: [experts, in] float64, product:
    [experts, in, in] float32 and reservoirs where they are wanted, else None. A matrix counts as one expert.
    """

    def __init__(
        self,
        features: int,
        wanted: Collection[str],
        *,
        experts: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """features: size of `in`. experts: size of a stack, None for a matrix. wanted: names of statistics.

        Raises: PtqcError for a statistic of another name.
        """
        unknown = sorted(set(wanted) - STATISTICS)
        if unknown:
            raise PtqcError(f"no statistic {unknown[0]!r}; there are {', '.join(sorted(STATISTICS))}")
        self.features, self.wanted, self.experts, self.seed = features, frozenset(wanted), experts, seed
        self.device = torch.device("cpu" if device is None else device)
        number = 1 if experts is None else experts
        shape = (number, features)
        self.count = torch.zeros(number, dtype=torch.int64, device=self.device)
        self.absmax = torch.zeros(shape, device=self.device)
        self.sum_abs = self._zeros("mean_abs", shape, torch.float64)
        self.sum = self._zeros("mean", shape, torch.float64)
        self.sum_square = self._zeros("mean_square", shape, torch.float64)
        self.product = self._zeros("hessian", (*shape, features), torch.float32)
        self.reservoirs = self._reservoirs(number)
        self._batch, self._first = 0, 0

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return torch.zeros(shape, dtype=dtype, device=self.device) if name in self.wanted else None

    def _reservoirs(self, number: int) -> list[Reservoir]:
        if not self.wanted & {"rows", "percentile"}:
            return []
        capacity = min(_ROWS, max(64, _ROWS_OF_A_STACK // number))
        return [Reservoir.empty(capacity, self.features, self.device) for _ in range(number)]

    def update(self, x: Tensor, experts: Tensor | None = None, *, mask: Tensor | None = None, batch: int = 0) -> None:
        """Take in rows.

        x: [..., in] of any float type. experts: [...] int64, the expert that each row belongs to; rows of experts that
        are not there (-1) are left out, and so are rows of zeros, which were routed to no expert. mask: [...] bool,
        rows that count. batch: its number among all batches: it makes the choice of sampled rows the same on however
        many processes the batches are spread.
        """
        rows = x.detach().reshape(-1, self.features)
        keep = None if mask is None else mask.reshape(-1).to(rows.device)
        numbers = self._numbers(len(rows), batch)
        if self.experts is None:
            chosen = rows if keep is None else rows[keep]
            self._take(0, chosen, numbers if keep is None else numbers[keep.to(numbers.device)])
            return
        if experts is None:
            raise PtqcError(f"rows of a stack of {self.experts} experts need the expert that each belongs to")
        index = experts.reshape(-1).to(rows.device, torch.int64)
        valid = (index >= 0) & (index < self.experts) & (rows != 0).any(-1)
        index = torch.where(valid if keep is None else valid & keep, index, self.experts)
        order = index.argsort(stable=True)
        sizes = torch.bincount(index, minlength=self.experts + 1)[: self.experts].tolist()
        numbers = numbers.to(rows.device)
        for expert, places in enumerate(order[: sum(sizes)].split(sizes)):
            if len(places):
                self._take(expert, rows[places], numbers[places])

    def _numbers(self, count: int, batch: int) -> Tensor:
        if batch != self._batch:
            self._batch, self._first = batch, 0
        first, self._first = self._first, self._first + count
        return row_numbers(batch, first, count)

    def _take(self, expert: int, rows: Tensor, numbers: Tensor) -> None:
        if not len(rows):
            return
        self.count[expert] += len(rows)
        for block, numbered in zip(rows.split(_BLOCK), numbers.split(_BLOCK), strict=True):
            self._take_block(expert, block.to(self.device, torch.float32), numbered)

    def _take_block(self, expert: int, block: Tensor, numbers: Tensor) -> None:
        size = block.abs()
        self.absmax[expert] = torch.maximum(self.absmax[expert], size.amax(0))
        if self.sum_abs is not None:
            self.sum_abs[expert] += size.sum(0)
        if self.sum is not None:
            self.sum[expert] += block.sum(0)
        if self.sum_square is not None:
            self.sum_square[expert] += block.square().sum(0)
        if self.product is not None:
            _add_product(self.product[expert], block)
        if self.reservoirs:
            self.reservoirs[expert].add(block, priorities(numbers, self.seed).to(self.device))

    def merge(self, other: "Statistics") -> None:
        """Take in the sums of another accumulator of the same value: the result is that of all rows of both.

        Raises: PtqcError if they are not of the same shape, statistics and seed.
        """
        mine, its = self._kind(), other._kind()
        if mine != its:
            raise PtqcError(f"statistics of different kinds do not merge: {mine} and {its}")
        self.count += other.count.to(self.device)
        self.absmax = torch.maximum(self.absmax, other.absmax.to(self.device))
        for sums, others in (
            (self.sum_abs, other.sum_abs),
            (self.sum, other.sum),
            (self.sum_square, other.sum_square),
            (self.product, other.product),
        ):
            if sums is not None and others is not None:
                sums += others.to(self.device)
        for reservoir, taken in zip(self.reservoirs, other.reservoirs, strict=True):
            reservoir.merge(taken)

    def _kind(self) -> tuple[Any, ...]:
        return self.features, self.experts, sorted(self.wanted), self.seed

    def restricted(self, wanted: Collection[str]) -> "Statistics":
        """The same sums, of fewer statistics; nothing is copied."""
        kept = Statistics(self.features, (), experts=self.experts, seed=self.seed, device=self.device)
        kept.wanted = self.wanted & frozenset(wanted)
        kept.count, kept.absmax = self.count, self.absmax
        kept.sum_abs = self.sum_abs if "mean_abs" in wanted else None
        kept.sum = self.sum if "mean" in wanted else None
        kept.sum_square = self.sum_square if "mean_square" in wanted else None
        kept.product = self.product if "hessian" in wanted else None
        kept.reservoirs = self.reservoirs if kept.wanted & {"rows", "percentile"} else []
        return kept

    def empty(self) -> "Statistics":
        """An accumulator of the same kind that has seen nothing."""
        return Statistics(self.features, self.wanted, experts=self.experts, seed=self.seed, device=self.device)

    @property
    def is_finite(self) -> bool:
        """Whether every number seen was finite."""
        return bool(torch.isfinite(self.absmax).all())

    def result(self) -> dict[str, Tensor]:
        """The wanted statistics by name, as the table above says; means of experts that saw no rows are zero."""
        rows = self.count.clamp(min=1)
        found: dict[str, Tensor] = {"absmax": self.absmax.clone(), "count": self.count.float()}
        if self.sum_abs is not None:
            found["mean_abs"] = (self.sum_abs / rows[:, None]).float()
        if self.sum is not None:
            found["mean"] = (self.sum / rows[:, None]).float()
        if self.sum_square is not None:
            found["mean_square"] = (self.sum_square / rows[:, None]).float()
        if self.product is not None:
            found["hessian"] = _mirrored(self.product / rows[:, None, None])
        if "rows" in self.wanted:
            found["rows"] = Reservoir.stacked(self.reservoirs)
        if "percentile" in self.wanted:
            found["percentile"] = torch.stack([reservoir.quantile(_PERCENTILE) for reservoir in self.reservoirs])
        return {
            name: value[0] if self.experts is None else value for name, value in found.items() if name in self.wanted
        }


def _tiles(features: int) -> list[tuple[int, int]]:
    """Runs of columns between which products are summed."""
    edges = [*range(0, features - _TILE // 2, _TILE), features] if features > _TILE else [0, features]
    return list(pairwise(edges))


def _add_product(total: Tensor, rows: Tensor) -> None:
    """Add x xT of every row to the tiles of `total` [in, in] on and above the diagonal: less arithmetic."""
    tiles = _tiles(len(total))
    for place, (top, bottom) in enumerate(tiles):
        for left, right in tiles[place:]:
            total[top:bottom, left:right].addmm_(rows[:, top:bottom].mT, rows[:, left:right])


def _mirrored(total: Tensor) -> Tensor:
    """Fill in the tiles below the diagonal of [..., in, in], in place."""
    tiles = _tiles(total.shape[-1])
    for place, (top, bottom) in enumerate(tiles):
        for left, right in tiles[place + 1 :]:
            total[..., left:right, top:bottom] = total[..., top:bottom, left:right].mT
    return total
