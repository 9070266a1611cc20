"""GPTQ: words made by hand, and what config.json says."""

import re

import pytest
import torch
from torch import nn

import ptqc
from ptqc.codegen.dialects.gptq import GPTQ
from ptqc.errors import CheckpointError, ExportError
from ptqc.spec import ScaleSpec, WeightSpec
from ptqc.storage import Codes
from tests.export._folders import UP, config_in, exported, ordered, quantized, rounded
from tests.tiny import tiny


def weight(codes, bits, group, zero=None, order=None):
    """A weight of these codes, with scales 1, 2, ... in every row."""
    columns = codes.shape[1] // group
    scale = torch.arange(1.0, columns + 1).expand(codes.shape[0], -1)
    spec = WeightSpec(bits=bits, group=group, zero="none" if zero is None else "int", scale=ScaleSpec(dtype="f16"))
    return ptqc.QuantTensor.from_codes(Codes(codes.to(torch.uint8), scale, zero, order), spec, torch.float32)


def stream(codes, bits):
    """Codes as one number, the first in the lowest bits, cut into words of 32 bits with a sign."""
    number = sum(int(code) << bits * place for place, code in enumerate(codes))
    words = [number >> 32 * place & 0xFFFFFFFF for place in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_words_made_by_hand(bits, version):
    codes = torch.randint(0, 2**bits, (32, 64), generator=torch.Generator().manual_seed(0))
    zero = torch.randint(1, 2**bits, (32, 2), generator=torch.Generator().manual_seed(1)).float()
    tails = GPTQ(version).write(weight(codes, bits, 32, zero))
    assert tails["qweight"][:, 5].tolist() == stream(codes[5], bits)
    stored = zero[:, 1].int() - int(version == "gptq")
    assert tails["qzeros"][1].tolist() == stream(stored, bits)
    assert tails["scales"].tolist() == [[1.0] * 32, [2.0] * 32]
    assert tails["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_symmetric_zeros_are_sevens():
    tails = GPTQ("gptq").write(weight(torch.zeros(8, 8), 4, 8))
    assert tails["qzeros"].tolist() == [[0x77777777]]


def test_columns_lie_in_the_order_of_the_inputs_and_g_idx_tells_the_groups():
    order = torch.tensor([6, 2, 0, 4, 1, 7, 5, 3])
    codes = torch.arange(8).repeat(8, 1)
    tails = GPTQ("gptq_v2").write(weight(codes, 4, 4, order=order))
    assert tails["qweight"].tolist() == [stream(order.argsort(), 4) * 8]
    assert tails["g_idx"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_the_first_version_has_no_place_for_zeros_of_zero(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(64, 32, bias=False)})
    model["up"].weight = rounded(torch.rand(32, 64), "int4g32z")
    with pytest.raises(ExportError, match=r'has no place for zero points of 0; use version="gptq_v2"'):
        ptqc.export(model, "gptq", tmp_path / "out", version="gptq")
    assert list(tmp_path.iterdir()) == []
    ptqc.export(model, "gptq", tmp_path / "out")
    assert config_in(tmp_path / "out")["checkpoint_format"] == "gptq_v2"


def test_zeros_that_borrowed_from_their_neighbours_are_read():
    """GPTQModel subtracts 0x11111111 from a word of zeros: [0, 3] is stored as nibbles 15 and 1."""
    words = torch.tensor([[0x00000030 - 0x11111111]], dtype=torch.int64).to(torch.int32)
    assert GPTQ("gptq")._zeros(words, 4, (8, 1)).flatten().tolist() == [0, 3, 0, 0, 0, 0, 0, 0]


def test_sizes_that_fill_no_words_are_refused():
    assert GPTQ().refuses(weight(torch.zeros(4, 8), 4, 8)) == "4 codes of 4 bits do not fill words of 32"


def test_the_config_of_equal_weights(tmp_path):
    exported(quantized("int4g32"), "gptq", tmp_path / "out")
    config = config_in(tmp_path / "out")
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
              "checkpoint_format": "gptq", "pack_dtype": "int32"}  # fmt: skip
    assert config | wanted == config
    assert "dynamic" not in config and "modules_in_block_to_quantize" not in config
    exported(ordered("int4g32z"), "gptq", tmp_path / "ordered")
    config = config_in(tmp_path / "ordered")
    assert (config["desc_act"], config["sym"], config["checkpoint_format"]) == (True, False, "gptq_v2")


def test_the_config_of_different_weights(tmp_path):
    model = quantized("int4g32")
    layer = model.model.layers[1]
    layer.mlp.down_proj.weight = rounded(layer.mlp.down_proj.weight.dequantize(), "int8g64")
    layer.self_attn.o_proj.weight = nn.Parameter(layer.self_attn.o_proj.weight.dequantize())
    report = ptqc.export(model, "gptq", tmp_path / "out")
    config = config_in(tmp_path / "out")
    rules = config["dynamic"]
    down, o = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"
    assert [re.fullmatch(rule[2:], name) is not None for rule in rules for name in (down, o)] == [1, 0, 0, 1]
    assert [*rules.values()] == [{"bits": 8, "group_size": 64, "sym": True, "desc_act": False}, {}]
    kept = config["modules_in_block_to_quantize"][0]
    assert UP in kept and o not in kept and len(kept) == 13
    assert "transformers does not" in str(report)


def test_head_in_words(tmp_path):
    model = quantized("int4g32")
    model.lm_head.weight = rounded(tiny("plain").lm_head.weight, "int4g32")
    tensors = exported(model, "gptq", tmp_path / "out")
    assert config_in(tmp_path / "out")["lm_head"] is True
    assert tensors["lm_head.qweight"].shape == (8, 128)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [({"checkpoint_format": "marlin"}, "GPTQ format 'marlin'"), ({"pack_dtype": "int16"}, "is not known")],
)
def test_other_formats_are_named(fields, fault):
    with pytest.raises(CheckpointError, match=fault):
        GPTQ.of_config({"quant_method": "gptq", "bits": 4} | fields, "config.json")
