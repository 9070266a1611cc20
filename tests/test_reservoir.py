"""Reservoirs: the same rows however the stream is split."""

import pytest
import torch

from ptqc.reservoir import Reservoir, priorities, row_numbers


def filled(rows, numbers, capacity=16):
    found = Reservoir.empty(capacity, rows.shape[1])
    found.add(rows, priorities(numbers, 3))
    return found


ROWS = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.cat([row_numbers(batch, 0, 100) for batch in range(5)])


@pytest.mark.parametrize("parts", [[500], [100] * 5, [3, 197, 300], [499, 1]])
def test_any_split_merges_to_the_whole(parts):
    whole = filled(ROWS, NUMBERS)
    merged = Reservoir.empty(16, 4)
    for rows, numbers in reversed(list(zip(ROWS.split(parts), NUMBERS.split(parts), strict=True))):
        merged.merge(filled(rows, numbers))
    assert len(whole.rows) == 16
    assert torch.equal(merged.rows, whole.rows)
    assert torch.equal(merged.priority, whole.priority)


def test_every_row_has_the_same_chance():
    hits = torch.zeros(500)
    for seed in range(400):
        hits[priorities(NUMBERS, seed).argsort()[:50]] += 1
    assert hits.min() > 20 and hits.max() < 65
    assert abs(float(hits[:250].mean()) - 40) < 1.5


def test_seeds_choose_differently():
    first, second = (priorities(NUMBERS, seed).argsort()[:16].tolist() for seed in (0, 1))
    assert first != second
    assert (priorities(NUMBERS, 0) >= 0).all()
    assert len(set(priorities(NUMBERS, 0).tolist())) == 500


def test_quantile_is_that_of_torch():
    found = filled(ROWS, NUMBERS, 500)
    torch.testing.assert_close(found.quantile(0.9), ROWS.abs().quantile(0.9, dim=0))
    assert Reservoir.empty(4, 3).quantile(0.9).tolist() == [0, 0, 0]


def test_stacking_fills_up_with_zeros():
    stack = Reservoir.stacked([filled(ROWS[:2], NUMBERS[:2]), Reservoir.empty(16, 4)])
    assert stack.shape == (2, 2, 4)
    assert stack[1].abs().sum() == 0
