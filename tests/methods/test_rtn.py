"""Round to nearest: every kind of spec, the scales it tries, and the grid it keeps exactly."""

import pytest
import torch

from ptqc import grid, storage
from ptqc.methods import METHODS, quantize_weight
from ptqc.passes.methods.rtn import RoundToNearest, affine_range, symmetric_scales
from ptqc.spec import KNOWN_SPECS, WeightSpec
from ptqc.testing import check_method

NAMES = ["int1g8", "int2g16", "int2g32f", "int3g64z", "int4g64", "int4g64-bf16", "int4g32m", "int5g8", "int6", "int8t",
         "int8g32-f32", "ternaryg64", "ternary", "nf4g64", "nf4g64dq", "fp4g32", "fp8e4m3", "fp8e4m3t",
         "fp8e4m3b128x128", "fp8e5m2t", "e2m1g16-e4m3", *sorted(KNOWN_SPECS)]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_promises(name):
    check_method(RoundToNearest(), WeightSpec.parse(name))


@pytest.mark.parametrize("bits", [1.58, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_specs(bits, symmetric):
    spec = RoundToNearest(symmetric).spec(bits, 32)
    assert spec.group == 32
    assert spec.is_symmetric == (symmetric or bits == 1.58)
    assert RoundToNearest().spec() == WeightSpec.parse("int4g64")
    assert RoundToNearest().spec(bits, -1).group is None


@pytest.mark.parametrize("name", ["int2g16z", "int4g16z", "int8g16z", "int4g16f", "int3g16m"])
def test_half_a_step_is_the_worst(name, seeded):
    spec = WeightSpec.parse(name)
    weight = torch.randn(8, 64, generator=seeded)
    scale, _ = affine_range(weight, spec)
    error = (quantize_weight(weight, RoundToNearest(), spec).dequantize() - weight).abs()
    # The integer zero rounds too, which moves an end of the range by up to half a step.
    allowed = (1.0 if spec.zero == "int" else 0.5) * 1.01 * scale.repeat_interleave(16, -1)
    assert (error <= allowed).all()


def test_symmetric_groups_get_the_best_of_three_scales(seeded):
    spec = WeightSpec.parse("int3g16")
    weight = torch.randn(32, 64, generator=seeded)
    chosen = RoundToNearest().choose(weight, spec, {})
    errors = []
    for scale in symmetric_scales(weight, spec):
        stored = storage.round_scale(scale, spec)
        candidate = storage.Codes(grid.choose_codes(weight, stored, None, spec), stored)
        errors.append(grid.group_error(weight, candidate, spec))
    assert torch.equal(grid.group_error(weight, chosen, spec), torch.stack(errors).amin(0))
    assert (torch.stack(errors).argmin(0).unique()).numel() > 1


def test_a_negative_scale_uses_the_level_that_has_no_partner():
    weight = torch.tensor([[8.0, -7.0, 3.0, 0.0]])
    stored = quantize_weight(weight, RoundToNearest(), WeightSpec.parse("int4"))
    assert float(stored.scale) == -1
    assert torch.equal(stored.dequantize(), weight)


def test_a_zero_point_helps_one_sided_weights(seeded):
    weight = torch.rand(8, 64, generator=seeded)
    errors = [
        (quantize_weight(weight, method, method.spec(4, 64)).dequantize() - weight).norm()
        for method in (RoundToNearest(symmetric=False), RoundToNearest())
    ]
    assert errors[0] < 0.6 * errors[1]


def test_ternary_levels(seeded):
    weight = torch.randn(4, 160, generator=seeded)
    stored = quantize_weight(weight, RoundToNearest(), RoundToNearest().spec(1.58, -1))
    assert stored.codes.shape == (4, 32)  # five to a byte
    assert (stored.dequantize().div(stored.scale.float()).unique()).tolist() == [-1, 0, 1]
    assert (stored.dequantize() - weight).norm() < 0.5 * weight.norm()


def test_codes_under_double_quantization_are_those_of_the_exact_scales(seeded):
    weight = torch.randn(64, 256, generator=seeded)
    plain = quantize_weight(weight, RoundToNearest(), WeightSpec.parse("nf4g64"))
    double = quantize_weight(weight, RoundToNearest(), WeightSpec.parse("nf4g64dq"))
    assert torch.equal(plain.codes, double.codes)


def test_refusals():
    assert METHODS.get("rtn")().refuses(WeightSpec.parse("q4_K")) is None
    lattice = WeightSpec.parse("e8p")
    assert "single weights" in RoundToNearest().refuses(lattice)
