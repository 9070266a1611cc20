"""quantize_weight: what every weight goes through, whatever the method."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from ptqc import methods
from ptqc.errors import SpecError, WeightError
from ptqc.methods import METHODS, hold_scales, quantize_weight, rows_at_once, whole_row
from ptqc.spec import WeightSpec
from ptqc.surroundings import stored_matrix, stored_statistics
from tests.surrounded import extras_for, surroundings

RTN = METHODS.get("rtn")()


def parse(name):
    return WeightSpec.parse(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_stands_in_for_the_weight(dtype, seeded):
    weight = torch.randn(2, 6, 32, generator=seeded).to(dtype)
    stored = quantize_weight(weight, RTN, parse("int8g16"))
    assert (stored.shape, stored.dtype, stored.spec) == (weight.shape, dtype, parse("int8g16"))
    assert (stored.dequantize() - weight).abs().max() < 0.03


def test_transposed(seeded):
    weight = torch.randn(32, 6, generator=seeded)
    stored = quantize_weight(weight, RTN, parse("int4g16"), is_transposed=True)
    assert stored.shape == weight.shape
    assert stored.stored_shape == (6, 32)
    assert torch.equal(stored.dequantize(), quantize_weight(weight.t(), RTN, parse("int4g16")).dequantize().t())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 4, dtype=torch.int64), "only float matrices"),
        (torch.ones(4), r'"w" is torch.float32 of shape \(4,\)'),
        (torch.ones(0, 4), "nothing to quantize"),
        (torch.tensor([[1.0, torch.nan], [torch.inf, -torch.inf]]), '"w" holds 3 NaN or infinite values of 4'),
        (torch.tensor([[1.0, torch.inf]], dtype=torch.float16), '"w" holds 1 NaN or infinite'),
    ],
)
def test_weights_that_cannot_be_quantized_are_named(weight, message):
    with pytest.raises(WeightError, match=message):
        quantize_weight(weight, RTN, parse("int4"), name="w")


def test_a_group_that_does_not_fit_names_the_weight_and_what_would():
    with pytest.raises(SpecError, match=r'cannot store "w" as int4g64: group 64 .* in_features 100; use'):
        quantize_weight(torch.ones(4, 100), RTN, parse("int4g64"), name="w")


def test_a_refusal_names_the_weight():
    with pytest.raises(SpecError, match=r'"w": hqq fits integer codes'):
        quantize_weight(torch.ones(4, 64), METHODS.get("hqq")(), parse("nf4g64"), name="w")


@pytest.mark.parametrize("magnitude", [1e-6, 1e8])
def test_scales_that_float16_cannot_hold_become_float32(magnitude, seeded, caplog):
    weight = torch.randn(4, 64, generator=seeded) * magnitude
    with caplog.at_level(logging.INFO, "ptqc"):
        stored = quantize_weight(weight, RTN, parse("int8g32"), name="w")
    assert stored.spec == parse("int8g32-f32")
    assert "do not fit f16" in caplog.text
    assert ((stored.dequantize() - weight).norm() / weight.norm()) < 0.01


def test_which_scales_are_held():
    assert hold_scales(parse("int4g32"), 0.1, "w") == parse("int4g32")
    assert hold_scales(parse("int4g32"), 0.0, "w") == parse("int4g32")
    assert hold_scales(parse("int4g32-bf16"), 1e9, "w") == parse("int4g32-bf16")
    assert hold_scales(parse("int4g32m"), 1e5, "w") == parse("int4g32m-f32")  # the minimum overflows, not the scale
    assert hold_scales(parse("int4g32z"), 1e5, "w") == parse("int4g32z")
    assert hold_scales(parse("e2m1g16-e4m3"), 1e4, "w") == parse("e2m1g16-f32")
    with pytest.raises(SpecError, match=r'"w": the f16 scales of q4_K do not hold weights near 1.0e-07; use'):
        hold_scales(parse("q4_K"), 1e-7, "w")


@pytest.mark.parametrize(
    ("method", "spec"), [("rtn", "int4g32z"), ("hqq", "int3g32f"), ("int8", "int8"), ("nf4", "nf4g64")]
)
def test_rows_in_pieces_get_the_same_codes_as_at_once(method, spec, seeded, monkeypatch):
    weight = torch.randn(3, 11, 64, generator=seeded)
    at_once = quantize_weight(weight, METHODS.get(method)(), parse(spec))
    monkeypatch.setattr(methods, "_WEIGHTS_AT_ONCE", 5 * 64)
    in_pieces = quantize_weight(weight, METHODS.get(method)(), parse(spec))
    assert all(torch.equal(part, in_pieces.parts[name]) for name, part in at_once.parts.items())


@dataclass(frozen=True)
class Watching:
    """Counts how often it is asked, and for how many rows."""

    needs: ClassVar[frozenset[str]] = frozenset()
    seen: ClassVar[list[int]] = []

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        return parse("int4")

    def refuses(self, spec: WeightSpec) -> str | None:
        return None

    def choose(self, weight: torch.Tensor, spec: WeightSpec, statistics: Mapping[str, torch.Tensor]):
        self.seen.append(len(weight))
        return RTN.choose(weight, spec, statistics)


@pytest.mark.parametrize(
    ("spec", "seen"), [("int4", [4, 4, 2]), ("int8t", [10]), ("nf4g32dq", [10]), ("q8_0", [4, 4, 2])]
)
def test_what_a_method_sees_at_once(spec, seen, monkeypatch):
    monkeypatch.setattr(methods, "_WEIGHTS_AT_ONCE", 4 * 32)
    Watching.seen.clear()
    quantize_weight(torch.ones(10, 32), Watching(), parse(spec).fit((10, 32)))
    assert Watching.seen == seen
    step = rows_at_once(Watching(), parse(spec), 32)
    assert step == (None if len(seen) == 1 else 4)


def test_whole_row():
    assert [whole_row(group, 64) for group in (None, -1, 32)] == [64, None, 32]


class Recording:
    """Rounds to nearest in a turned order, and keeps what it was given."""

    needs = frozenset({"hessian"})

    def refuses(self, spec):
        return None

    def choose(self, weight, spec, statistics):
        self.weight, self.statistics = weight, statistics
        order = torch.arange(weight.shape[-1]).flip(0)
        return replace(RTN.choose(weight[:, order].contiguous(), spec, {}), order=order)


def test_a_method_sees_the_stored_matrix_and_its_order_is_kept(seeded):
    weight, rows, kind = torch.randn(96, 64, generator=seeded), torch.randn(50, 64, generator=seeded), "everything"
    around = surroundings(kind, weight.shape)
    extras, method = extras_for(around, weight.shape), Recording()
    statistics = {"hessian": rows.T @ rows / 50}
    stored = quantize_weight(
        weight, method, parse("int8g32"), statistics=statistics, surroundings=around, extras=extras
    )
    torch.testing.assert_close(method.weight, stored_matrix(weight, around, extras))
    moved = stored_statistics(statistics, around, extras)
    torch.testing.assert_close(method.statistics["hessian"], moved["hessian"])
    assert torch.equal(stored.extras["order"], extras["order"].flip(0))
    assert (stored.dequantize() - weight).norm() / weight.norm() < 0.02
    with pytest.raises(SpecError, match=r'cannot store "w" as int8g32: the surroundings .* need the extras'):
        quantize_weight(weight, method, parse("int8g32"), name="w", surroundings=around)
