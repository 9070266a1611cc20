"""Hadamard rotations as a transform."""

import pytest
import torch

from ptqc.errors import PtqcError
from ptqc.methods import METHODS, quantize_weight
from ptqc.passes.transforms.hadamard import Hadamard
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings, apply, steps_undoing, stored_matrix
from ptqc.transforms import TRANSFORMS, Member


def member(out_features=48, in_features=80, name="w"):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    return Member(name, weight, {}, WeightSpec.parse("int4g16"))


@pytest.mark.parametrize("sides", ["input", "both"])
def test_rotation_and_back_is_the_weight(sides):
    one = member()
    around, extras = Hadamard(sides=sides).around(one)
    assert tuple(extras) == around.extra_names
    stored = stored_matrix(one.weight, around, extras)
    assert not torch.allclose(stored, one.weight, atol=0.1)
    torch.testing.assert_close(apply(steps_undoing(around, extras), stored), one.weight, atol=1e-5, rtol=0)


def test_rotation_spreads_outliers():
    one = member(64, 256)
    one.weight[:, 3] *= 50
    spec = WeightSpec.parse("int4g128")
    around, extras = Hadamard().around(one)
    stored = stored_matrix(one.weight, around, extras)
    rtn = METHODS.get("rtn")()
    plain = (quantize_weight(one.weight, rtn, spec).dequantize() - one.weight).norm()
    rotated = (quantize_weight(stored, rtn, spec).dequantize() - stored).norm()  # rotations keep the norm
    assert rotated < 0.6 * plain


def test_signs_depend_on_the_seed_and_the_input_size_alone_on_the_name_for_outputs():
    first, second = (Hadamard(sides="both").around(member(name=name))[1] for name in "ab")
    assert torch.equal(first["input_signs"], second["input_signs"])
    assert not torch.equal(first["output_signs"], second["output_signs"])
    other = Hadamard(sides="both", seed=1).around(member(name="a"))[1]
    assert not torch.equal(first["input_signs"], other["input_signs"])
    assert first["input_signs"].dtype == torch.int8 and set(first["input_signs"].tolist()) == {-1, 1}
    assert first["input_signs"][:12].tolist() == [-1, -1, -1, 1, -1, 1, -1, -1, -1, 1, -1, 1]


def test_options_and_defaults():
    assert TRANSFORMS.get("hadamard") is Hadamard
    around, _ = Hadamard().around(member())
    assert around == Surroundings(input_rotation=around.input_rotation)
    with pytest.raises(PtqcError, match='"input" or "both"'):
        Hadamard(sides="output")
