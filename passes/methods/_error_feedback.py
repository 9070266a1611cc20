"""Rounding a weight column by column, each error made up for by the columns that follow.

With H = R R', R upper triangular, the error E = W - Q of a rounded weight costs tr(E H E') = |E R|^2, and column j of
E R is R_jj (E_j + sum_{i<j} E_i F_ij), F = R / diag(R). So column j is rounded at w_j + sum_{i<j} E_i F_ij, and what
then remains of it counts R_jj^2. These are the codes of GPTQ (Frantar et al. 2022, arXiv:2210.17323), which updates the
weights by the Cholesky factor of the inverse of H: Chee et al. 2023, arXiv:2307.13304, theorem 6. Here no inverse is
needed, which saves half of the arithmetic and of its rounding errors.

Lazy batches are recursive: the first half of the columns is rounded, its errors reach the second half as one matrix
product, then the second half is rounded. Only runs of 32 columns are updated one at a time.

Weights are held transposed, [stack, in, out], so that a column is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Feedback", "Levels", "Scales", "factor", "inverse_of"]

_AT_ONCE = 32
"""Columns that are updated one at a time."""

Levels = Callable[[Tensor], Tensor]
"""Rounds values in units of the scale to the nearest level; may write into its argument."""


def factor(hessian: Tensor, damp: Tensor) -> Tensor:
    """R of H + damp mean(diag H) I = R R', upper triangular.

    hessian: [stack, in, in] float32. damp: [stack]. Where H is not positive definite even so, float64 is tried, then
    ten times the damping, and again. A column that was always zero gets the mean of the others and no neighbours: it
    is rounded to nearest, like everything where H is all zero.
    """
    turned = hessian.flip(-1, -2)  # its lower factor, turned back, is the upper one; a copy
    del hessian  # the largest tensors of a calibrated run: no more than two of them at a time
    diagonal = turned.diagonal(dim1=-2, dim2=-1)
    is_dead = diagonal <= 0
    mean = diagonal.clamp_min(0).sum(-1) / (~is_dead).sum(-1).clamp_min(1)
    mean = torch.where(mean > 0, mean, 1.0)
    turned.masked_fill_(is_dead[:, None, :] | is_dead[:, :, None], 0)
    diagonal.add_(torch.where(is_dead, mean[:, None], 0.0)).add_((damp * mean)[:, None])
    lower, failed = torch.linalg.cholesky_ex(turned)
    for index in failed.nonzero().flatten().tolist():
        lower[index] = _factor_anyway(turned[index], float(damp[index]), float(mean[index]))
    del turned, diagonal
    upper: Tensor = lower.flip(-1, -2)
    return upper


def _factor_anyway(damped: Tensor, damp: float, mean: float) -> Tensor:
    wide = damped.double()
    while True:
        lower, failed = torch.linalg.cholesky_ex(wide)
        if not failed:
            narrow: Tensor = lower.float()
            return narrow
        more = max(10 * damp, 1e-6)
        wide.diagonal().add_((more - damp) * mean)
        damp = more


@dataclass
class Scales:
    """Scales and zeros as they will be read back, [stack, groups, out]; zeros in units of the scale, or None."""

    scale: Tensor
    zero: Tensor | None = None


@dataclass
class Feedback:
    """One weight that is being rounded.

    weight: [stack, in, out], columns in the order in which they are rounded. factor: R of the inputs in that order.
    group_of: [stack, in] int64, the group of the column that is rounded j-th.
    begin: called with the number of each run of `group` columns and its weights [stack, group, out], made up for the
    errors so far, before they are rounded: the moment to set its scales. None: all scales are there.
    """

    weight: Tensor
    factor: Tensor
    levels: Levels
    scales: Scales
    group_of: Tensor
    group: int
    begin: Callable[[int, Tensor], None] | None = None
    unit: Tensor = field(init=False)
    target: Tensor = field(init=False)
    error: Tensor = field(init=False)

    def run(self) -> Tensor:
        """Round all columns. Returns the numbers that stand for them, [stack, in, out]."""
        self.unit = self.factor / self.factor.diagonal(dim1=-2, dim2=-1)[:, None, :]
        self.target, self.error = self.weight.clone(), torch.empty_like(self.weight)
        self._round(0, self.weight.shape[1])
        return self.weight - self.error

    def _round(self, first: int, last: int) -> None:
        """Round the columns first to last, whose targets hold the errors of all columns before them."""
        columns = last - first
        if columns == self.group and self.begin is not None:
            self.begin(first // self.group, self._made_up(first, last))
        is_within_group = self.begin is None or columns <= self.group
        if columns <= _AT_ONCE and is_within_group:
            self._round_each(first, last)
            return
        step = 1 if is_within_group else self.group
        middle = first + columns // step // 2 * step
        self._round(first, middle)
        reach = self.unit[:, first:middle, middle:last]
        self.target[:, middle:last].baddbmm_(reach.mT, self.error[:, first:middle])
        self._round(middle, last)

    def _made_up(self, first: int, last: int) -> Tensor:
        """The weights of a group that would cancel all errors before it: what GPTQ updates them to."""
        weight = self.weight[:, first:last]
        unit = self.unit[:, first:last, first:last]
        owed = self.target[:, first:last] - weight
        made_up: Tensor = torch.linalg.solve_triangular(unit.mT, owed, upper=False, unitriangular=True)
        return weight + made_up

    def _round_each(self, first: int, last: int) -> None:
        index = self.group_of[:, first:last, None]
        scale = self.scales.scale.take_along_dim(index, 1)
        zero = None if self.scales.zero is None else self.scales.zero.take_along_dim(index, 1)
        inverse = inverse_of(scale)
        for column in range(first, last):
            at = column - first
            level = self.target[:, column] * inverse[:, at]
            if zero is None:
                number = self.levels(level).mul_(scale[:, at])
            else:
                number = self.levels(level.add_(zero[:, at])).sub_(zero[:, at]).mul_(scale[:, at])
            error = torch.sub(self.weight[:, column], number, out=self.error[:, column])
            if column + 1 < last:  # bmm, not addcmul: that waits for threads, and this is too little to share
                reach = self.unit[:, column, column + 1 : last, None]
                self.target[:, column + 1 : last].baddbmm_(reach, error[:, None])


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that would be infinite: such groups are zero."""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 0.0, 1.0 / scale)
