"""Codebooks: the properties that define them."""

import pytest
import torch

from ptqc.codebooks import CODEBOOKS, codebook, dynamic_map, nearest_codes
from ptqc.errors import SpecError


def test_nf4_are_normal_quantiles():
    """Appendix E of the paper: 8 positive and 9 negative quantiles of a normal, sharing zero, scaled to 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values
    torch.testing.assert_close(codebook("nf4").table(), levels / levels.max(), atol=2e-4, rtol=0)


def test_fp4_and_e2m1_hold_the_same_magnitudes_up_to_scale():
    assert sorted(codebook("e2m1").table().abs().tolist()[:8]) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    fp4 = sorted(set((codebook("fp4").table().abs() * 12).tolist()))
    assert fp4 == pytest.approx([0, 0.0625, 2, 3, 4, 6, 8, 12])


@pytest.mark.parametrize("name", [name for name, book in CODEBOOKS.items() if book.levels])
def test_nearest_code_is_nearest(name, seeded):
    levels = codebook(name).table()
    values = torch.randn(500, generator=seeded) * levels.abs().max()
    chosen = levels[nearest_codes(values, levels).long()]
    assert torch.equal((chosen - values).abs(), (levels - values[:, None]).abs().amin(-1))


def test_every_level_is_its_own_nearest():
    levels = dynamic_map()
    assert torch.equal(nearest_codes(levels, levels).long(), torch.arange(256))


def test_dynamic_map_shape():
    levels = dynamic_map()
    assert levels.numel() == 256
    assert levels.unique().numel() == 256
    assert (levels[0], levels[-1], levels.abs().min()) == (-0.99296875, 1.0, 0.0)


def test_unknown_codebook():
    with pytest.raises(SpecError, match="nf4"):
        codebook("nf3")
