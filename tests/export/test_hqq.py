"""hqq itself: its layers unpack what we write, and we read what they pack."""

import pytest
import torch

import ptqc
from ptqc.codegen.dialects.hqq import HQQ
from tests.export._folders import config_in, exported, matrix, quantized
from tests.export.test_bitsandbytes import _Tensor

BITS = [8, 4, 3, 2, 1]


@pytest.fixture
def quantize():
    return pytest.importorskip("hqq.core.quantize")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("outputs", [32, 48])
def test_hqq_unpacks_our_tensors(quantize, bits, outputs):
    weight = matrix(64, outputs, f"int{bits}g32f")["up"].weight
    layer = quantize.HQQLinear(None, quantize.BaseQuantizeConfig(), compute_dtype=torch.float32, device="cpu")
    layer.load_state_dict(HQQ().write(weight))
    torch.testing.assert_close(layer.dequantize(), weight.dequantize(), rtol=0, atol=0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_we_unpack_theirs_and_pack_them_again(quantize, bits):
    linear = torch.nn.Linear(128, 64, bias=False)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    layer = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    layer.encoded_state_dict = True
    own = {name: value.data for name, value in layer.state_dict().items()}
    entries = {tail: _Tensor(value) for tail, value in own.items()}
    dialect = HQQ()
    read = dialect.read(dialect.describe("up.weight", entries, torch.float32), entries)
    torch.testing.assert_close(read.dequantize(), layer.dequantize(), rtol=0, atol=0)
    written = dialect.write(read)
    assert written.keys() == own.keys()
    for tail in ("W_q", "scale", "zero", "shape", "packing", "unpack_view_dtype", "compute_dtype", "nbits"):
        assert torch.equal(written[tail], own[tail]), tail


def test_bytes_made_by_hand(tmp_path):
    tensors = exported(matrix(32, 4, "int4g32f"), "hqq", tmp_path / "out")
    model = ptqc.load(tmp_path / "out", model=matrix(32, 4, "int4g32f"))
    codes = [model["up"].weight.codes.flatten()[16 * row].item() & 15 for row in range(4)]
    assert tensors["up.W_q"].shape == (2, 32)
    assert tensors["up.W_q"][:, 0].tolist() == [codes[0] * 16 + codes[2], codes[1] * 16 + codes[3]]
    assert bytes(tensors["up.packing"].tolist()) == b"4bit_u8"


def test_scales_that_the_type_of_the_model_does_not_hold():
    model = quantized("int4g32f", dtype=torch.bfloat16)
    reason = HQQ().refuses(model.model.layers[0].mlp.up_proj.weight)
    assert reason == "scales of f16 are stored in torch.bfloat16, which does not hold them"
    assert str(HQQ().nearest(model.model.layers[0].mlp.up_proj.weight)[0]) == "int4g32z-bf16"


def test_the_config_says_the_commonest(tmp_path):
    exported(quantized("int4g64f"), "hqq", tmp_path / "out")
    config = config_in(tmp_path / "out")
    assert config["quant_config"]["weight_quant_params"]["nbits"] == 4
    assert config["quant_config"]["weight_quant_params"]["group_size"] == 64
    assert config["skip_modules"] == ["lm_head"]
