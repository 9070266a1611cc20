"""Lattice codebooks: their points are those of E8, the nearest is found, and the error is what the paper has."""

import pytest
import torch

from ptqc import grid
from ptqc.codebooks import codebook
from ptqc.errors import SpecError
from ptqc.lattice import LATTICES, nearest_e8, nearest_e8p
from ptqc.spec import WeightSpec

E8P, E8 = LATTICES["e8p"].stages[0], LATTICES["e8p3"].stages[1]


def is_in_e8(points):
    """All integers or all halves, with an even sum."""
    doubled = (2 * points).round()
    same = (doubled % 2 == doubled[:, :1] % 2).all(1)
    return torch.equal(doubled, 2 * points) and bool(same.all()) and bool((points.sum(1) % 2 == 0).all())


def test_e8p_points_are_those_of_the_paper():
    """Section 4.2: (D8 + 1/2) of norm 10 or less and 29 of norm 12, moved by +1/4 or -1/4."""
    points = torch.from_numpy(E8P.points())
    shift = torch.where(torch.arange(1 << 16) % 2 == 1, 0.25, -0.25)[:, None]
    assert is_in_e8(points - shift)
    assert len(points.unique(dim=0)) == 1 << 16
    magnitudes = (points - shift).abs().unique(dim=0)
    norms = magnitudes.square().sum(1)
    assert len(magnitudes) == 256 and (norms <= 10).sum() == 227 and (norms == 12).sum() == 29


def test_the_residual_points_are_in_e8():
    points = torch.from_numpy(E8.points())
    assert is_in_e8(points) and len(points.unique(dim=0)) == 256
    assert points.square().sum(1).unique(return_counts=True)[1].tolist() == [1, 240, 15]


@pytest.mark.parametrize(("nearest", "stage"), [(nearest_e8p, E8P), (nearest_e8, E8)])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_nearest_is_nearest(nearest, stage, spread, seeded):
    points = torch.from_numpy(stage.points()).double()
    vectors = spread * torch.randn(500, 8, generator=seeded)
    vectors[:2] = torch.tensor([[0.0], [0.25]])
    found = (points[nearest(vectors)] - vectors).square().sum(1)
    least = torch.cdist(vectors.double(), points, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)
    torch.testing.assert_close(found, least, rtol=1e-5, atol=1e-5)


def test_every_point_is_its_own_nearest():
    assert torch.equal(nearest_e8p(torch.from_numpy(E8P.points())), torch.arange(1 << 16))
    assert torch.equal(nearest_e8(torch.from_numpy(E8.points())), torch.arange(256))
    assert nearest_e8p(torch.zeros(0, 8)).shape == nearest_e8(torch.zeros(0, 8)).shape == (0,)


@pytest.mark.parametrize(("name", "error"), [("e8p", 0.0911), ("e8p3", 0.0295), ("e8p4", 0.0083)])
def test_error_of_a_normal_distribution(name, error, seeded):
    """Measured with 2^20 weights; Lloyd-Max has 0.1175, 0.0345 and 0.0095 with as many bits."""
    lattice, vectors = LATTICES[name], torch.randn(1 << 14, 8, generator=seeded)

    def mean_square(rms):
        return float((lattice.nearest(rms * vectors)[1] / rms - vectors).square().mean())

    assert mean_square(lattice.rms) == pytest.approx(error, rel=0.02)
    assert mean_square(lattice.rms) < min(mean_square(0.93 * lattice.rms), mean_square(1.07 * lattice.rms))


@pytest.mark.parametrize("name", ["e8p", "e8pt", "e8p4g16"])
def test_codes_of_a_weight(name, seeded):
    """The arithmetic that methods share: what a spec holds comes back."""
    spec = WeightSpec.parse(name)
    shape = (2, 6, 32)
    codes = torch.randint(0, 1 << spec.bits, (2, 6, 4), generator=seeded)
    scale = 2.0 ** torch.randint(-3, 3, (2, *spec.groups(shape)), generator=seeded)
    weight = grid.reconstruct(grid.storage.Codes(codes, scale), spec)
    again = grid.choose_codes(weight, scale, None, spec)
    assert weight.shape == shape and again.shape == codes.shape
    if spec.bits == 16:  # stages are searched one by one: their sum may be reached better or worse another way
        assert torch.equal(again, codes)


def test_a_lattice_has_no_levels():
    with pytest.raises(SpecError, match="eight weights"):
        codebook("e8p").table()
    assert codebook("e8p").largest == 2.75
