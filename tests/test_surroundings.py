"""Surroundings: JSON, the equation, and what a method is given within them."""

import json

import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.surroundings import (
    Surroundings,
    apply,
    check_extras,
    steps_after,
    steps_before,
    steps_undoing,
    stored_matrix,
    stored_statistics,
)
from tests.surrounded import KINDS, extras_for, surroundings

SHAPES = [(96, 60), (3, 32, 24)]


@pytest.mark.parametrize("kind", KINDS)
def test_json_reads_back(kind):
    around = surroundings(kind, (96, 64))
    form = around.to_json()
    assert Surroundings.from_json(json.loads(json.dumps(form))) == around
    assert hash(around) == hash(Surroundings.from_json(form))
    assert not around.is_trivial
    assert around.keeps_weight == (kind in ("int8", "static", "outliers"))


def test_nothing_around_is_an_empty_table():
    assert Surroundings().is_trivial
    assert Surroundings().to_json() == {}
    assert Surroundings().layout((4, 8)) == {}


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        (None, "are a table, not None"),
        ({"scale": True}, "called 'scale'; known: input_scale"),
        ({1: True}, "called 1"),
        ({"order": 1}, "order around a weight cannot be 1"),
        ({"input_rotation": None}, "input_rotation around a weight cannot be None"),
        ({"act": "int7"}, "'int7' is no activation spec"),
        ({"act": {"dtype": "int8"}}, "act around a weight cannot be"),
    ],
)
def test_hostile_json_is_refused(form, complaint):
    with pytest.raises(SpecError, match=complaint):
        Surroundings.from_json(form)


@pytest.mark.parametrize("name", ["had32", "had" + "9" * 101, "had64; rm", "rot64", "had1x64x2", "had", ""])
def test_a_rotation_of_another_size_is_refused_by_its_name(name):
    with pytest.raises(SpecError, match="no rotation of 64 channels"):
        Surroundings(input_rotation=name).layout((96, 64))


def test_extras_are_held_against_the_layout():
    around, shape = surroundings("everything", (96, 64)), (96, 64)
    good = extras_for(around, shape)
    check_extras(around, good, shape)
    repeated = torch.zeros(64, dtype=torch.int32)
    for broken, complaint in [
        ({n: e for n, e in good.items() if n != "order"}, "need the extras .*; found are"),
        (good | {"act_scale": torch.tensor(0.1)}, "need the extras"),
        (good | {"order": good["order"].long()}, r"order must be torch.int32 \[64\], not torch.int64"),
        (good | {"input_scale": torch.ones(96)}, r"must be torch.float32 \[64\]"),
        (good | {"order": repeated}, "every input once"),
        (good | {"order": repeated - 1}, "every input once"),
        (good | {"input_scale": torch.zeros(64)}, "other than zero"),
        (good | {"input_scale": torch.full((64,), torch.nan)}, "finite"),
        (good | {"output_signs": torch.zeros(96, dtype=torch.int8)}, "signs"),
    ]:
        with pytest.raises(SpecError, match=complaint):
            check_extras(around, broken, shape)
    with pytest.raises(SpecError, match="order 6, which none"):
        check_extras(Surroundings(input_rotation="had6x10"), {"input_signs": torch.ones(60, dtype=torch.int8)}, (8, 60))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "int8" not in kind])
def test_the_stored_matrix_between_its_steps_is_the_weight(kind, shape, seeded):
    around = surroundings(kind, shape)
    extras = extras_for(around, shape)
    weight, x = torch.randn(shape, generator=seeded), torch.randn(*shape[:-2], 5, shape[-1], generator=seeded)
    stored = stored_matrix(weight, around, extras)
    torch.testing.assert_close(apply(steps_undoing(around, extras), stored), weight, rtol=1e-4, atol=1e-5)
    around = Surroundings(around.input_scale, around.order, around.input_rotation, around.output_rotation)
    product = apply(steps_before(around, extras, x.dtype), x) @ stored.mT
    torch.testing.assert_close(apply(steps_after(around, extras), product), x @ weight.mT, rtol=1e-4, atol=1e-4)


def statistics_of(rows):
    return {
        "hessian": rows.mT @ rows / rows.shape[-2],
        "absmax": rows.abs().amax(-2),
        "mean_abs": rows.abs().mean(-2),
        "mean": rows.mean(-2),
        "percentile": rows.abs().quantile(0.999, dim=-2),
        "rows": rows,
        "count": torch.full(rows.shape[:-2], float(rows.shape[-2])),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_what_the_stored_matrix_sees(kind, shape, seeded):
    around = surroundings(kind, shape)
    extras = extras_for(around, shape)
    rows = torch.randn(*shape[:-2], 50, shape[-1], generator=seeded)
    floating = Surroundings(around.input_scale, around.order, around.input_rotation, around.output_rotation)
    expected = statistics_of(apply(steps_before(floating, extras, rows.dtype), rows))
    moved = stored_statistics(statistics_of(rows), around, extras)
    assert moved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=1e-5)


def test_magnitudes_behind_a_rotation_are_left_out_without_rows():
    statistics = statistics_of(torch.randn(50, 64))
    del statistics["rows"]
    around = Surroundings(input_rotation="had64")
    moved = stored_statistics(statistics, around, extras_for(around, (96, 64)))
    assert moved.keys() == {"hessian", "mean", "count"}


def test_act_alone_leaves_the_weight_alone():
    weight, around = torch.randn(4, 8), Surroundings(act=ActSpec(dtype="int8"))
    assert stored_matrix(weight, around, {}) is weight
