"""Packs of weights that serving engines merge."""

import pytest
import torch

from ptqc.codegen.serving import PACKS, Kind, disagreements, kind_of
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings
from tests.export._folders import rounded

ORDER = torch.tensor([1, 0])


def kind(spec="int4g32", order=None):
    return Kind(WeightSpec.parse(spec), Surroundings(order=order is not None), order)


@pytest.mark.parametrize("pack", PACKS)
def test_packs_that_agree(pack):
    assert disagreements({f"a.0.{name}.weight": kind() for name in pack}) == []
    assert disagreements({f"{name}.weight": kind(order=ORDER) for name in pack}) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (kind("int8"), "int8"),
        (Kind(None, None), "floating point"),
        (kind(order=ORDER), "int4g32 in an order of its own"),
    ],
)
def test_packs_that_differ(other, said):
    kinds = {"a.q_proj.weight": kind(), "a.k_proj.weight": kind(), "a.v_proj.weight": other}
    assert disagreements(kinds) == [f"a: q_proj is in int4g32, v_proj in {said}"]


def test_orders_are_compared_by_value():
    kinds = {"gate_proj.weight": kind(order=ORDER), "up_proj.weight": kind(order=ORDER.flip(0))}
    assert len(disagreements(kinds)) == 1


def test_modules_of_other_names_and_parents_are_not_merged():
    eight = kind("int8")
    assert disagreements({"a.q_proj.weight": kind(), "b.k_proj.weight": eight, "a.o_proj.weight": eight}) == []


def test_kinds():
    assert str(kind_of(torch.ones(2, 2), None)) == "floating point"
    assert kind_of(rounded(torch.ones(2, 32), "int4g32").data, None).agrees(kind())
