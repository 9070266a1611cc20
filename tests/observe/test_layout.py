"""Layouts: the expert of every row."""

import torch

from ptqc.passes.observe.layout import Layout

X = torch.arange(2 * 3 * 4.0).view(2, 3, 4)


def test_a_matrix_has_no_experts():
    rows, experts = Layout().rows(X, None)
    assert rows is not None and torch.equal(rows, X) and experts is None
    assert torch.equal(Layout(-2).rows(X, None)[0], X.mT)


def test_experts_along_an_axis():
    rows, experts = Layout(-1, "each", 2, (-3,)).rows(X, None)
    assert torch.equal(rows, X)
    assert experts.tolist() == [[0, 0, 0], [1, 1, 1]]
    rows, experts = Layout(-3, "each", 4, (-1,)).rows(X, None)
    assert torch.equal(rows, X.movedim(0, -1))
    assert experts.tolist() == [[0, 1, 2, 3]] * 3


def test_each_expert_reads_every_row():
    rows, experts = Layout(-1, "each", 2, (None,)).rows(X, None)
    assert rows.shape == (2, 3, 2, 4)
    assert torch.equal(rows[..., 1, :], X)
    assert experts[0, 0].tolist() == [0, 1]


def test_an_index_gives_rows_to_experts():
    assert Layout(-1, "given", 4, ()).rows(X, 3)[1].tolist() == [[3] * 3] * 2
    assert Layout(-1, "given", 4, ()).rows(X, torch.tensor(-1))[1].tolist() == [[3] * 3] * 2
    assert Layout(-1, "given", 4, (-3,)).rows(X, torch.tensor([3, 1]))[1].tolist() == [[3] * 3, [1] * 3]
    ids = torch.tensor([[0, 1, 2], [3, 0, 1]])
    assert torch.equal(Layout(-1, "given", 4, (-3, -2)).rows(X, ids)[1], ids)
    assert torch.equal(Layout(-1, "given", 4, (-2, -3)).rows(X, ids.T)[1], ids)


def test_an_index_axis_that_the_value_lacks_repeats_rows():
    ids = torch.tensor([[0, 1], [2, 3], [1, 1]])  # [tokens, choices]; a value [tokens, in]
    rows, experts = Layout(-1, "given", 4, (-2, None)).rows(X[0], ids)
    assert rows.shape == (3, 2, 4)
    assert torch.equal(experts, ids)


def test_offsets_end_the_rows_of_each_expert():
    rows, experts = Layout(-1, "offsets", 4).rows(X.view(6, 4), torch.tensor([2, 2, 5, 5], dtype=torch.int32))
    assert rows.shape == (6, 4)
    assert experts.tolist() == [0, 0, 2, 2, 2, 4]
