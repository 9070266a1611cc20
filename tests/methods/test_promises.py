"""Every method keeps the promises of `ptqc.testing`, for every kind of spec it makes; and the peers agree."""

import pytest
import torch

from ptqc.methods import METHODS, quantize_weight
from ptqc.spec import WeightSpec
from ptqc.testing import check_method

RTN = ["int8", "int6g32", "int5g64", "int4g64", "int4g32z", "int4g32m", "int3g64z", "int2g16", "ternaryg64",
       "nf4g64", "fp8e4m3", "fp8e4m3t", "q4_K", "q6_K"]  # fmt: skip
HQQ = ["int8g64f", "int6g64f", "int5g64f", "int4g64f", "int3g32f", "int2g16f", "int4g64z", "int4g64m", "int4g64"]


@pytest.mark.parametrize("name", RTN)
def test_rtn(name):
    check_method(METHODS.get("rtn")(), WeightSpec.parse(name), is_exact_on_grid=name not in ("int4g32z", "int3g64z"))


@pytest.mark.parametrize("name", HQQ)
def test_hqq(name):
    check_method(METHODS.get("hqq")(), WeightSpec.parse(name), is_exact_on_grid=False)


@pytest.mark.parametrize("name", ["nf4", "fp4", "fp8", "int8"])
def test_presets(name):
    check_method(METHODS.get(name)())


@pytest.mark.parametrize("bits", [1.58, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [8, 40, -1])
@pytest.mark.parametrize("name", ["rtn", "hqq"])
def test_every_width_and_group(name, bits, group, seeded):
    method = METHODS.get(name)()
    weight = torch.randn(6, 120, generator=seeded)
    stored = quantize_weight(weight, method, method.spec(bits, group))
    assert stored.spec.group == (None if group == -1 else group)
    error = float((stored.dequantize() - weight).norm() / weight.norm())
    assert error < {1.58: 0.75, 2: 0.75, 3: 0.4, 4: 0.2, 5: 0.1, 6: 0.05, 8: 0.02}[bits]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_same_numbers_as_bitsandbytes(name, double, seeded):
    peer = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(128, 512, generator=seeded)
    stored, state = peer.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=double)
    method = METHODS.get(name)(double_quant=double)
    ours = quantize_weight(weight, method, method.spec()).dequantize()
    torch.testing.assert_close(ours, peer.dequantize_4bit(stored, state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hqq_beats_rounding_and_the_hqq_package(bits, seeded):
    peer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = torch.distributions.StudentT(4.0).sample((64, 512))
    method = METHODS.get("hqq")()
    spec = method.spec(bits, 64)
    ours = (quantize_weight(weight, method, spec).dequantize() - weight).norm()
    rounded = (quantize_weight(weight, METHODS.get("rtn")(), spec).dequantize() - weight).norm()
    stored = peer.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    theirs = (peer.dequantize(*stored).float() - weight).norm()
    assert ours < rounded
    assert ours < theirs
