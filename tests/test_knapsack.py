"""One choice from each group: optimal where that can be checked, always within the budget."""

from itertools import product

import numpy as np
import pytest

from ptqc import knapsack
from ptqc.errors import PtqcError
from ptqc.knapsack import choose_one_each


def cost_of(choice, costs):
    return sum(row[chosen] for row, chosen in zip(costs, choice, strict=True))


def problem(seed, groups=6, alternatives=4):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 40, (groups, alternatives)).tolist()
    costs = random.exponential(size=(groups, alternatives)).tolist()
    return costs, sizes, int(sum(map(min, sizes)) + random.integers(0, 60))


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_optimal(seed):
    costs, sizes, budget = problem(seed)
    every = [choice for choice in product(range(4), repeat=6) if cost_of(choice, sizes) <= budget]
    found = choose_one_each(costs, sizes, budget)
    assert cost_of(found, sizes) <= budget
    assert cost_of(found, costs) == pytest.approx(min(cost_of(choice, costs) for choice in every))


@pytest.mark.parametrize("cells", [10, 100])
def test_coarse_tables_keep_the_budget_and_are_no_worse_than_prices(monkeypatch, cells):
    monkeypatch.setattr(knapsack, "_CELLS", cells)
    for seed in range(20):
        costs, sizes, budget = problem(seed, groups=12)
        found = choose_one_each(costs, sizes, budget)
        assert cost_of(found, sizes) <= budget
        assert cost_of(found, costs) <= cost_of(knapsack._by_price(costs, sizes, budget), costs)


def test_a_budget_for_everything_takes_the_best():
    assert choose_one_each([[3.0, 1.0], [2.0, 0.0]], [[1, 9], [1, 9]], 18) == [1, 1]


def test_a_budget_for_nothing_says_what_it_takes():
    with pytest.raises(PtqcError, match="the smallest choices take 3, more than the budget of 2"):
        choose_one_each([[1.0], [1.0]], [[1], [2]], 2)
