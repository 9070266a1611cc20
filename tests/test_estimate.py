"""Estimates grow with what they estimate."""

from dataclasses import replace

import pytest

from ptqc.estimate import Cost, Shape, estimate_bytes, estimate_seconds, product_rate, seconds_per_weight
from ptqc.methods import METHODS
from ptqc.spec import WeightSpec

SHAPES = [Shape(1, 1024, 1024, "x"), Shape(1, 512, 1024, "x")]
COST = Cost(SHAPES, {"hessian"}, parameters=10**7, tokens=10**5)


@pytest.fixture
def rate(monkeypatch):
    monkeypatch.setattr("ptqc.estimate.product_rate", lambda: 1e9)


@pytest.mark.usefixtures("rate")
def test_seconds_of_calibrated_work():
    seconds = estimate_seconds(COST, 0.0)
    assert seconds > 2 * 10**7 * 10**5 * 2 / 1e9
    assert estimate_seconds(replace(COST, passes=1), 0.0) < seconds
    assert estimate_seconds(replace(COST, needs=frozenset({"absmax"})), 0.0) < seconds
    apart = replace(COST, shapes=[SHAPES[0], replace(SHAPES[1], source="y")])
    assert estimate_seconds(apart, 0.0) > seconds  # two Hessians instead of one


@pytest.mark.usefixtures("rate")
def test_without_data_only_the_method_counts():
    assert estimate_seconds(replace(COST, tokens=0), 1e-6) == pytest.approx(1e-6 * 1.5 * 1024 * 1024)


def test_memory_counts_what_is_held():
    assert estimate_bytes(COST, 100, 10, is_streamed=False) - estimate_bytes(COST, 100, 10, is_streamed=True) == 110
    assert estimate_bytes(replace(COST, needs=()), 0, 0, is_streamed=True) < estimate_bytes(
        COST, 0, 0, is_streamed=True
    )


def test_speeds_are_measured():
    assert product_rate() > 1e7
    assert 0 < seconds_per_weight(METHODS.get("rtn")(), WeightSpec.parse("int4g64")) < 1e-3
