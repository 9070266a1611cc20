"""Groups of a weight, and the nearest codes in them."""

import pytest
import torch

from ptqc import grid, storage
from ptqc.codebooks import CODEBOOKS
from ptqc.spec import WeightSpec


@pytest.mark.parametrize("name", ["int4g16", "int4", "int8t", "fp8e4m3b4x16", "fp8e4m3b5x7", "int4g3z"])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_tiles_come_back(name, lead, seeded):
    spec = WeightSpec.parse(name)
    weight = torch.randn(*lead, 10, 48, generator=seeded)
    tiled = grid.tiles(weight, spec)
    assert tiled.shape[:-1] == (*lead, *spec.groups(weight.shape))
    assert torch.equal(grid.untile(tiled, spec, weight.shape), weight)


def test_a_tile_is_what_shares_a_scale():
    weight = torch.arange(24.0).view(4, 6)
    assert grid.tiles(weight, WeightSpec.parse("fp8e4m3b2x3"))[1, 0].tolist() == [12, 13, 14, 18, 19, 20]
    assert grid.tiles(weight, WeightSpec.parse("int4g2"))[3, 2].tolist() == [22, 23]
    partial = grid.tiles(weight, WeightSpec.parse("fp8e4m3b3x4"))
    assert partial[1, 1].tolist() == [22, 23, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_extremes(seeded):
    weight = torch.randn(3, 8, generator=seeded)
    low, high = grid.extremes(weight, WeightSpec.parse("int4g4"))
    assert torch.equal(low, weight.view(3, 2, 4).min(-1).values)
    assert torch.equal(high, weight.view(3, 2, 4).max(-1).values)


@pytest.mark.parametrize("name", ["int3g8", "int3g8z", "int3g8f", "int3g8m", "nf4g8", "fp4g8", "ternaryg8", "iq4nlg8"])
def test_codes_are_the_nearest(name, seeded):
    spec = WeightSpec.parse(name)
    weight = torch.randn(5, 16, generator=seeded)
    scale = torch.rand(5, 2, generator=seeded) + 0.1
    zero = None if spec.is_symmetric else torch.randint(0, 8, (5, 2), generator=seeded).float()
    chosen = storage.Codes(grid.choose_codes(weight, scale, zero, spec), scale, zero)
    count = len(spec.book.levels) if spec.book else 2**spec.bits
    every = torch.stack(
        [storage.Codes(torch.full_like(chosen.codes, code), scale, zero).codes for code in range(count)]
    )
    errors = torch.stack([
        (storage.combine(storage.levels(codes, spec), scale, zero, spec) - weight).abs() for codes in every
    ])  # fmt: skip
    error = (storage.combine(storage.levels(chosen.codes, spec), scale, zero, spec) - weight).abs()
    torch.testing.assert_close(error, errors.amin(0), rtol=1e-5, atol=1e-6)


def test_float_codes_saturate():
    spec = WeightSpec.parse("fp8e4m3")
    codes = grid.choose_codes(torch.tensor([[1e9, -1e9, 1.0]]), torch.ones(1, 1), None, spec)
    assert codes.float().tolist() == [[CODEBOOKS["fp8e4m3"].largest, -CODEBOOKS["fp8e4m3"].largest, 1.0]]


@pytest.mark.parametrize("scale", [0.0, 1e-40])
@pytest.mark.parametrize("name", ["int4g4", "int4g4z", "nf4g4"])
def test_a_vanishing_scale_gives_level_zero(name, scale):
    spec = WeightSpec.parse(name)
    zero = None if spec.is_symmetric else torch.full((1, 1), 3.0)
    codes = grid.choose_codes(torch.tensor([[0.0, 1e-40, -1e-40, 0.0]]), torch.full((1, 1), scale), zero, spec)
    level = storage.levels(codes, spec) - (0 if zero is None else 3)
    assert (level == 0).all()


def test_reconstruct_rounds_scales_as_storing_does(seeded):
    spec = WeightSpec.parse("int4g16")
    weight = torch.randn(4, 32, generator=seeded)
    scale = weight.view(4, 2, 16).abs().amax(-1) / 7
    logical = storage.Codes(grid.choose_codes(weight, scale, None, spec), scale)
    parts = storage.encode(logical, spec)
    assert torch.equal(grid.reconstruct(logical, spec), storage.decode(parts, spec, weight.shape, torch.float32))
    expected = (grid.reconstruct(logical, spec) - weight).square().view(4, 2, 16).sum(-1)
    torch.testing.assert_close(grid.group_error(weight, logical, spec), expected)
