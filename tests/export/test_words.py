"""Words of codes: every lay, and its inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqc.codegen.words import Lay, groups_of, groupwise_of, order_of, pack_words, unpack_words, weight_of
from ptqc.errors import CheckpointError
from ptqc.surroundings import Surroundings
from tests.export._folders import rounded

LAYS = [Lay("columns"), Lay("columns", turned=True), Lay("out"), Lay("out", turned=True),
        Lay("out", turned=True, places=(0, 2, 4, 6, 1, 3, 5, 7))]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), n=st.integers(1, 70), seed=st.integers(0, 9))
def test_words_are_unpacked(bits, rows, n, seed):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-n * bits // 32))
    assert torch.equal(unpack_words(words, bits, n), codes)


@settings(max_examples=60, deadline=None)
@given(lay=st.sampled_from(LAYS), bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_lays_are_unpacked(lay, bits, rows, columns):
    shape = (8 * rows, 8 * columns)
    matrix = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    assert torch.equal(lay.unpack(lay.pack(matrix, bits), bits, shape), matrix)


def test_shapes_of_words_of_weights_without_values():
    assert pack_words(torch.empty(1, 64, dtype=torch.uint8, device="meta"), 4).shape == (1, 8)


@pytest.mark.parametrize("spec", ["int4g32", "int3g16z", "int8", "int2g64z-bf16"])
@pytest.mark.parametrize("has_order", [False, True])
def test_a_weight_comes_back(spec, has_order):
    extras = {"order": torch.randperm(64, generator=torch.Generator().manual_seed(0)).int()} if has_order else {}
    weight = rounded(torch.randn(8, 64), spec, Surroundings(order=has_order), **extras).data
    form = groupwise_of(weight)
    scale, zero = form.scale.float(), form.zero.float()
    group = form.group_of.long()
    expected = (form.codes.float() - zero[:, group]) * scale[:, group]
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)
    again = weight_of(form, weight)
    torch.testing.assert_close(again.dequantize(), expected, rtol=0, atol=0)


def test_orders_are_found_in_groups():
    assert order_of(torch.arange(8) // 4, 2, "w") == Surroundings()
    assert order_of(torch.zeros(8).int(), 1, "w") == Surroundings()
    assert order_of(torch.tensor([1, 0, 1, 0]), 2, "w") == Surroundings(order=True)


@pytest.mark.parametrize(
    "groups", [torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 2, 2]), torch.tensor([0, 0, -1, -1]), torch.ones(4)]
)
def test_groups_that_are_none(groups):
    with pytest.raises(CheckpointError, match=r'the tensors of "w" make no sense: g_idx'):
        order_of(groups, 2, "w")


def test_groups_divide_the_inputs():
    assert (groups_of(64, 2, "w"), groups_of(64, 1, "w")) == (32, None)
    for inputs, columns in ((64, 3), (64, 0), (0, 1)):
        with pytest.raises(CheckpointError, match="groups do not divide"):
            groups_of(inputs, columns, "w")
