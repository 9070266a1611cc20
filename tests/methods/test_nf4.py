"""NF4: the promises, and the numbers of bitsandbytes."""

import pytest
import torch

from ptqc import storage
from ptqc.errors import SpecError
from ptqc.methods import METHODS, quantize_weight
from ptqc.passes.methods.nf4 import NormalFloat4
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


@pytest.mark.parametrize("double_quant", [False, True])
def test_promises(double_quant):
    check_method(NormalFloat4(double_quant))
    check_method(NormalFloat4(double_quant), NormalFloat4(double_quant).spec(group=-1))


def test_specs():
    assert NormalFloat4().spec() == WeightSpec.parse("nf4g64")
    assert NormalFloat4(double_quant=True).spec(4, 128) == WeightSpec.parse("nf4g128dq")
    assert NormalFloat4().spec(group=-1) == WeightSpec.parse("nf4")
    with pytest.raises(SpecError, match=r"nf4 has 4 bits, not 3; .* rtn or hqq"):
        NormalFloat4().spec(3)
    assert NormalFloat4().refuses(WeightSpec.parse("nf4g32dq")) is None
    assert "use rtn" in NormalFloat4().refuses(WeightSpec.parse("int4g64"))


def test_by_hand():
    weight = torch.zeros(1, 64)
    weight[0, :3] = torch.tensor([-2.0, 1.0, 0.3])
    numbers = quantize_weight(weight, NormalFloat4(), NormalFloat4().spec()).dequantize()
    assert numbers[0, :3].tolist() == pytest.approx([-2.0, 2 * 0.4407098293304443, 2 * 0.16093020141124725])
    assert (numbers[0, 3:] == 0).all()


def hard_weights(generator):
    """Weights on which another rounding rule would show: midpoints, equal blocks, zeros, outliers, small and large."""
    book = torch.tensor(WeightSpec.parse("nf4").book.levels)
    midpoints = torch.cat([(book[1:] + book[:-1]) / 2, book]).repeat(4, 34)[:, :1024]
    normal = torch.randn(96, 1024, generator=generator)
    holes = normal.clone()
    holes[:, :128] = 0
    holes[3] = 0
    spiked = normal.clone()
    spiked[5, 5] = 1e4
    return [midpoints, normal * 1e-3, normal * 1e3, normal.abs() + 1, normal / normal.flip(0), holes, spiked]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_numbers_of_bitsandbytes(name, double_quant, seeded):
    peer = pytest.importorskip("bitsandbytes.functional")
    method = METHODS.get(name)(double_quant=double_quant)
    for weight in hard_weights(seeded):
        codes, state = peer.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=double_quant)
        ours = quantize_weight(weight, method, method.spec())
        torch.testing.assert_close(ours.dequantize(), peer.dequantize_4bit(codes, state), rtol=1e-6, atol=0)
        if double_quant and state.state2.absmax.all():  # where all blocks are equal, any code of the scales will do
            assert torch.equal(ours.scale.flatten(), state.absmax.flatten())
            assert torch.equal(ours.scale_outer, state.state2.absmax)


def test_double_quantization_stores_eight_bit_scales(seeded):
    weight = torch.randn(64, 1024, generator=seeded)
    method = NormalFloat4(double_quant=True)
    stored = quantize_weight(weight, method, method.spec())
    assert 8 * stored.nbytes / weight.numel() == pytest.approx(method.spec().bits_per_weight, rel=1e-3)
    scale, _ = storage.decode_scales(stored.parts, stored.spec, weight.shape)
    torch.testing.assert_close(scale, weight.view(64, 16, 64).abs().amax(-1), rtol=0.02, atol=0)
