"""One choice from each group of alternatives, at the least total cost within a budget: multiple-choice knapsack.

    minimise  sum_i cost[i][c_i]   subject to   sum_i size[i][c_i] <= budget

1. Lagrangian relaxation: at a price per unit of size every group chooses for itself; bisection finds the price at which
   the choices just fit. It is optimal on the convex hull of the trade-off and gives a bound, but leaves a gap.
2. Dynamic programming over sizes closes the gap. Sizes are counted in their greatest common divisor where the budget is
   at most `_CELLS` of these, which is exact; else in larger units, every size rounded up, so that the budget holds.
The better of both is returned. (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11.)
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ptqc.errors import PtqcError

__all__ = ["choose_one_each"]

_CELLS = 1 << 17
"""Most cells of the table of the dynamic program for one group."""
_BISECTIONS = 80

Costs = Sequence[Sequence[float]]
Sizes = Sequence[Sequence[int]]


def choose_one_each(costs: Costs, sizes: Sizes, budget: int) -> list[int]:
    """The alternative of every group. costs, sizes: of the alternatives of each group; sizes are not negative.

    Raises: PtqcError if not even the smallest alternatives fit.
    """
    smallest = sum(min(row) for row in sizes)
    if smallest > budget:
        raise PtqcError(f"the smallest choices take {smallest}, more than the budget of {budget}")
    found = [_by_price(costs, sizes, budget), _by_table(costs, sizes, budget)]
    return min((choice for choice in found if choice is not None), key=lambda choice: _total(costs, choice))


def _total(table: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    return sum(row[chosen] for row, chosen in zip(table, choice, strict=True))


# -------------------------------------------------------------------- Lagrangian


def _by_price(costs: Costs, sizes: Sizes, budget: int) -> list[int]:
    low, high = 0.0, 1.0
    if _total(sizes, _at_price(costs, sizes, low)) <= budget:
        return _at_price(costs, sizes, low)
    while _total(sizes, _at_price(costs, sizes, high)) > budget and high < 1e300:
        high *= 4
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _total(sizes, _at_price(costs, sizes, middle)) > budget:
            low = middle
        else:
            high = middle
    choice = _at_price(costs, sizes, high)
    return choice if _total(sizes, choice) <= budget else [row.index(min(row)) for row in map(list, sizes)]


def _at_price(costs: Costs, sizes: Sizes, price: float) -> list[int]:
    """Every group for itself; the smaller of two that are equally good."""
    return [
        min(range(len(row)), key=lambda c: (row[c] + price * size[c], size[c]))
        for row, size in zip(costs, sizes, strict=True)
    ]


# -------------------------------------------------------------------- dynamic program


def _by_table(costs: Costs, sizes: Sizes, budget: int) -> list[int] | None:
    """None if rounding the sizes up leaves no choice within the budget."""
    unit = math.gcd(*(size for row in sizes for size in row)) or 1
    unit *= max(1, -(-budget // (unit * _CELLS)))
    cells = budget // unit
    best = np.zeros(cells + 1)
    chosen: list[NDArray[np.uint8]] = []
    units = [[-(-size // unit) for size in row] for row in sizes]
    for row, counts in zip(costs, units, strict=True):
        trials = np.full((len(row), cells + 1), np.inf)
        for alternative, count in enumerate(counts):
            if count <= cells:
                trials[alternative, count:] = row[alternative] + best[: cells + 1 - count]
        chosen.append(trials.argmin(0).astype(np.uint8))
        best = trials.min(0)
    if not np.isfinite(best[cells]):
        return None
    return _traced_back(chosen, units, cells)


def _traced_back(chosen: Sequence[NDArray[np.uint8]], units: Sequence[Sequence[int]], cells: int) -> list[int]:
    choice = []
    for table, counts in zip(reversed(chosen), reversed(units), strict=True):
        alternative = int(table[cells])
        choice.append(alternative)
        cells -= counts[alternative]
    return choice[::-1]
