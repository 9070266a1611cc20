"""check_method finds the methods that break a promise."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from ptqc import storage
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.spec import WeightSpec
from ptqc.testing import check_method, on_grid, worst_error


@dataclass(frozen=True)
class Broken(RoundToNearest):
    """Rounds to nearest, and then does something else."""

    spoil: Callable[[storage.Codes, torch.Tensor], storage.Codes] = lambda codes, weight: codes

    def choose(self, weight, spec, statistics):
        return self.spoil(super().choose(weight, spec, statistics), weight)


def scaled(factor):
    return lambda codes, weight: replace(codes, scale=codes.scale * factor)


def overwrite(codes, weight):
    weight[0, 0] = 1
    return codes


def by_chance(codes, weight):
    return replace(codes, codes=codes.codes ^ torch.randint(0, 2, codes.codes.shape, dtype=torch.uint8))


def by_the_first_row(codes, weight):
    return replace(codes, scale=codes.scale * (1.001 if weight.flatten()[0] > 0 else 1))


def never_zero(codes, weight):
    return replace(codes, scale=codes.scale + 1e-3, codes=codes.codes.clamp_min(9))


@pytest.mark.parametrize(
    ("spoil", "promise"),
    [
        (scaled(1.4), "over the bound"),
        (scaled(torch.inf), "infinite or NaN"),
        (scaled(1.001), "not stored exactly"),
        (overwrite, "was changed"),
        (by_chance, "other codes the second time"),
        (by_the_first_row, "another row|among others"),
        (never_zero, "not zero|over the bound"),
    ],
)
def test_broken_methods_are_found(spoil, promise):
    with pytest.raises(AssertionError, match=rf"Broken.* at int4g32: .*({promise})"):
        check_method(Broken(spoil=spoil), WeightSpec.parse("int4g32"))


def test_a_right_method_passes():
    check_method(Broken(), WeightSpec.parse("int4g32"))


@pytest.mark.parametrize("name", ["int4g16", "int4g16z", "int4g16f", "int4g16m", "nf4g16", "fp8e4m3g16", "ternaryg16"])
def test_weights_on_the_grid_span_it(name):
    spec = WeightSpec.parse(name)
    weight = on_grid(spec, (4, 32)).view(4, 2, 16)
    assert torch.equal(weight, on_grid(spec, (4, 32)).view(4, 2, 16))
    assert (weight.amax(-1) > weight.amin(-1)).all()


def test_the_worst_error():
    assert worst_error(WeightSpec.parse("int4")) == 1 / 15
    assert worst_error(WeightSpec.parse("fp8e4m3")) == 2**-4
    assert worst_error(WeightSpec.parse("nf4")) == pytest.approx((1 - 0.6961928) / 2)
    assert worst_error(WeightSpec.parse("iq4nl")) == pytest.approx(14 / 127)
