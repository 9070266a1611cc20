"""Tables that know weights by identity."""

import gc

import torch
from torch import nn

from ptqc.identity import WeightTable, mark_of
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from tests.cpp._run import random_parts


def weight():
    spec = WeightSpec.parse("int4g32")
    parts = random_parts(spec, 8, 32, torch.Generator().manual_seed(0))
    return nn.Parameter(QuantTensor(parts, spec, (8, 32), torch.float32), requires_grad=False)


def test_equal_weights_are_different_keys_that_end_with_them():
    table, floats, stored, twin = WeightTable(), nn.Parameter(torch.ones(2)), weight(), weight()
    table[floats], table[stored] = 1, 2
    assert table[floats] == 1 and table[stored] == 2 and twin not in table and table.get(twin, 3) == 3
    assert table.setdefault(stored, 5) == 2 and table.setdefault(twin, 5) == 5
    assert mark_of(floats) is floats and mark_of(stored) is not stored
    del floats, stored
    gc.collect()
    assert len(table._values) == 1


def test_a_weight_that_is_moved_is_another():
    layer, table = nn.Linear(32, 8, bias=False), WeightTable()
    layer.weight = weight()
    parameter = layer.weight
    table[parameter] = "known"
    layer.to(torch.bfloat16)
    assert layer.weight is parameter and parameter not in table
