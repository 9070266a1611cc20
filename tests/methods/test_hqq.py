"""HQQ: the promises at every width, and that it finds what it looks for."""

import pytest
import torch

from ptqc.errors import SpecError
from ptqc.methods import quantize_weight
from ptqc.passes.methods.hqq import HalfQuadratic
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.spec import WeightSpec
from ptqc.testing import check_method

WIDTHS = [1.58, 1, 2, 3, 4, 5, 6, 7, 8]


def numbers(weight, method, spec):
    return quantize_weight(weight, method, spec).dequantize()


def heavy_tailed(*shape):
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample(shape)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", [32, -1])
def test_promises(bits, group):
    check_method(HalfQuadratic(), HalfQuadratic().spec(bits, group))


@pytest.mark.parametrize("zero", ["int", "min", "none"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_promises_with_other_zeros(zero, bits):
    check_method(HalfQuadratic(zero=zero), HalfQuadratic(zero=zero).spec(bits, 32))


@pytest.mark.parametrize("norm", [0.7, 1.0])
def test_promises_with_other_norms(norm):
    check_method(HalfQuadratic(norm=norm), HalfQuadratic().spec(3, 32))


def test_specs():
    assert HalfQuadratic().spec() == WeightSpec.parse("int4g64f")
    assert HalfQuadratic().spec(3, -1) == WeightSpec.parse("int3f")
    assert HalfQuadratic().spec(1.58, 32) == WeightSpec.parse("ternaryg32")
    assert HalfQuadratic(zero="int").spec(2, 128) == WeightSpec.parse("int2g128z")
    with pytest.raises(SpecError, match="no integer spec has 9 bits"):
        HalfQuadratic().spec(9)


@pytest.mark.parametrize("options", [{"norm": 0.0}, {"norm": 2.5}, {"iterations": 0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(SpecError, match=r"hqq (minimises a norm|needs at least one)"):
        HalfQuadratic(**options)


@pytest.mark.parametrize("name", ["nf4g64", "fp8e4m3", "q4_K", "int8t", "int8b128x128", "int4g32-e8m0"])
def test_refusals_say_what_would_work(name):
    reason = HalfQuadratic().refuses(WeightSpec.parse(name))
    assert name in reason
    assert "int4g64f" in reason
    assert "rtn" in reason


@pytest.mark.parametrize("zero", ["float", "int", "min", "none"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_smaller_error_than_rounding_on_weights_and_outputs(zero, bits):
    weight, method = heavy_tailed(64, 256), HalfQuadratic(zero=zero, weighted=False)
    spec = method.spec(bits, 64)
    ours = numbers(weight, method, spec) - weight
    rounded = numbers(weight, RoundToNearest(), spec) - weight
    x = torch.randn(512, 256)
    assert ours.norm() < rounded.norm()
    assert (x @ ours.t()).norm() < (x @ rounded.t()).norm()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_norm_of_the_paper_lowers_its_own_objective(bits):
    weight = heavy_tailed(64, 256)
    methods = (HalfQuadratic(norm=0.7, weighted=False, iterations=20), HalfQuadratic(weighted=False), RoundToNearest())
    paper, squares, rounded = (
        float((numbers(weight, method, HalfQuadratic().spec(bits, 64)) - weight).abs().pow(0.7).sum())
        for method in methods
    )
    assert paper < squares < rounded


def test_weighting_favours_large_weights():
    weight = heavy_tailed(64, 256)
    large = weight.abs() > 3
    weighted, plain = (
        (numbers(weight, HalfQuadratic(weighted=weighted), HalfQuadratic().spec(2, 64)) - weight)
        for weighted in (True, False)
    )
    assert weighted[large].norm() < plain[large].norm()
    assert plain.norm() < weighted.norm() < 1.1 * plain.norm()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [16, 64, 512])
def test_near_the_best_of_an_exhaustive_search(bits, group):
    weight = heavy_tailed(16, 512).view(-1, group)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    top, best = 2**bits - 1, torch.full((len(weight), 1), torch.inf)
    for lower in torch.linspace(0, 0.96, 17):
        for upper in torch.linspace(0, 0.96, 17):
            bottom, scale = low * (1 - lower), (high * (1 - upper) - low * (1 - lower)) / top
            codes = ((weight - bottom) / scale).round().clamp(0, top)
            best = best.minimum((codes * scale + bottom - weight).square().sum(-1, keepdim=True))
    method = HalfQuadratic(weighted=False)
    error = (numbers(weight, method, method.spec(bits, -1)) - weight).square().sum()
    assert error < 1.03 * best.sum()


def test_a_group_far_from_zero(seeded):
    for offset in (10.0, 1e3, 3e4):
        weight = offset + torch.randn(4, 64, generator=seeded) * offset * 1e-4
        stored = quantize_weight(weight, HalfQuadratic(), WeightSpec.parse("int4g64f"))
        assert stored.zero.isfinite().all()
        assert (stored.zero.abs() <= 512 + 15).all()
        assert ((stored.dequantize() - weight).abs() <= offset * 2**-9).all()


def test_float16_zeros_are_the_ones_codes_were_chosen_for(seeded):
    weight = torch.randn(32, 64, generator=seeded) + 3
    spec = WeightSpec.parse("int6g64f")
    stored = quantize_weight(weight, HalfQuadratic(), spec)
    scale, zero = stored.scale.float(), stored.zero.float()
    codes = (weight / scale + zero).round().clamp(0, 63)
    torch.testing.assert_close(stored.dequantize(), (codes - zero) * scale, rtol=1e-5, atol=0)


def test_the_number_of_threads_changes_nothing(seeded):
    weight = torch.randn(600, 512, generator=seeded)
    threads, spec = torch.get_num_threads(), WeightSpec.parse("int3g64f")
    try:
        torch.set_num_threads(1)
        alone = HalfQuadratic().choose(weight, spec, {})
        torch.set_num_threads(2)
        together = HalfQuadratic().choose(weight, spec, {})
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.scale, together.scale)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_smaller_error_than_the_hqq_package(bits):
    peer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = heavy_tailed(64, 512)
    ours = numbers(weight, HalfQuadratic(), HalfQuadratic().spec(bits, 64)) - weight
    stored = peer.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    theirs = peer.dequantize(*stored).float() - weight
    assert ours.norm() < theirs.norm()
    assert ours.abs().pow(0.7).sum() < theirs.abs().pow(0.7).sum()
