"""bitsandbytes itself: it unpacks what we write, and we read what it packs and what transformers saves with it."""

import json

import pytest
import torch
import transformers

import ptqc
from ptqc.act_spec import ActSpec
from ptqc.codegen.dialects.bitsandbytes import BitsAndBytes
from ptqc.errors import CheckpointError, ExportError
from ptqc.surroundings import Surroundings
from tests.export._folders import UP, config_in, exported, matrix, quantized, rounded
from tests.tiny import IDS, logits, tiny

STATE = "weight.quant_state.bitsandbytes__"


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("spec", ["nf4g64", "fp4g64", "nf4g64dq", "fp4g128dq"])
def test_bitsandbytes_packs_the_same_bytes(bnb, tmp_path, spec):
    """The codes and scales of its own quantizer, written by us, are its own tensors."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    is_nested, block = spec.endswith("dq"), 128 if "128" in spec else 64
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=is_nested, quant_type=spec[:3]
    )
    own = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    entries = {tail: _Tensor(value) for tail, value in own.items()}
    dialect = BitsAndBytes()
    read = dialect.read(dialect.describe("up.weight", entries, torch.float32), entries)
    assert str(read.spec) == spec
    torch.testing.assert_close(read.dequantize(), bnb.functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7)
    written = dialect.write(read)
    assert written.keys() == own.keys()
    for tail in own.keys() - {f"{STATE}{spec[:3]}"}:
        torch.testing.assert_close(written[tail], own[tail], rtol=0, atol=1e-7)
    ours, theirs = (json.loads(bytes(side[f"{STATE}{spec[:3]}"].tolist())) for side in (written, own))
    assert ours == theirs


class _Tensor:
    """A tensor in memory as an entry of a file."""

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, tuple(value.shape), value.dtype

    def read(self):
        return self.value


@pytest.mark.parametrize("spec", ["nf4g64", "nf4g64dq", "fp4g32"])
def test_transformers_opens_our_folder(bnb, tmp_path, spec):
    model = quantized(spec)
    ptqc.export(model, "bitsandbytes", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(theirs.get_submodule(UP)).__name__ == "Linear4bit"
    # In training it computes in the model's type; otherwise, on some processors, in a kernel of bfloat16.
    found = theirs.train()(input_ids=IDS).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ],
)
def test_we_open_their_folder(bnb, tmp_path, fields):
    tiny("plain").save_pretrained(tmp_path / "float")
    config = transformers.BitsAndBytesConfig(**fields)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ptqc.load(tmp_path / "theirs")
    assert isinstance(ours.get_submodule(UP).weight, ptqc.QuantTensor)
    torch.testing.assert_close(logits(ours), theirs.train()(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_int8_both_ways(bnb, tmp_path):
    tiny("plain").save_pretrained(tmp_path / "float")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ptqc.load(tmp_path / "theirs")
    weight = ours.get_submodule(UP).weight
    assert (str(weight.spec), str(weight.surroundings.act)) == ("int8-f32", "int8-token-outlier6")
    expected = logits(theirs)
    assert (logits(ours) - expected).norm() < 0.02 * expected.norm()
    ptqc.export(ours, "bitsandbytes", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


C_PROJ = "transformer.h.0.attn.c_proj"
"""A square weight of a Conv1D: no shape would give a wrong orientation away."""


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_a_conv1d_both_ways(bnb, tmp_path, bits):
    """transformers puts linears in the place of a Conv1D, and saves their weights [out, in]."""

    def of_theirs(folder, **fields):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **fields)
        assert type(theirs.get_submodule(C_PROJ)).__name__.startswith("Linear")
        for module in theirs.modules():
            module.train(type(module).__name__ == "Linear4bit")  # as above; dropout stays off
        return theirs

    tiny("transposed").save_pretrained(tmp_path / "float")
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    theirs = of_theirs(tmp_path / "float", quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ptqc.load(tmp_path / "theirs")
    assert ours.get_submodule(C_PROJ).weight.is_transposed
    expected, tolerance = logits(theirs), 0.02 if bits == 8 else 1e-5  # inputs are rounded in float16, ours in float32
    assert (logits(ours) - expected).norm() < tolerance * expected.norm()
    ptqc.export(ours, "bitsandbytes", tmp_path / "again")
    torch.testing.assert_close(logits(of_theirs(tmp_path / "again")), expected, rtol=1e-5, atol=1e-5)


def test_bytes_made_by_hand(tmp_path):
    tensors = exported(matrix(64, 2, "nf4g32"), "bitsandbytes", tmp_path / "out")
    model = ptqc.load(tmp_path / "out", model=matrix(64, 2, "nf4g32"))
    codes = model["up"].weight.codes
    first, second = codes.flatten()[0] & 15, codes.flatten()[0] >> 4
    assert tensors["up.weight"].shape == (64, 1)
    assert tensors["up.weight"][0].item() == first * 16 + second
    assert tensors["up.weight.absmax"].shape == (4,)
    state = json.loads(bytes(tensors[f"up.{STATE}nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [2, 64]}


def test_the_config(tmp_path):
    exported(quantized("nf4g64dq"), "bitsandbytes", tmp_path / "out")
    config = config_in(tmp_path / "out")
    wanted = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6.0,
              "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32",
              "llm_int8_skip_modules": ["lm_head"]}  # fmt: skip
    assert config | wanted == config


@pytest.mark.parametrize("threshold", [0.0, 4.5])
def test_the_threshold_of_outliers_is_theirs(tmp_path, threshold):
    dialect = BitsAndBytes.of_config({"llm_int8_threshold": threshold}, "config.json")
    act = ActSpec(dtype="int8", outlier=threshold or None)
    assert dialect.refuses(matrix(64, 32, "int8")["up"].weight) is not None
    model = quantized("int8", Surroundings(act=act))
    exported(model, "bitsandbytes", tmp_path / "out")
    assert config_in(tmp_path / "out")["llm_int8_threshold"] == threshold
    assert ptqc.load(tmp_path / "out").get_submodule(UP).weight.surroundings.act == act
    model.lm_head.weight = rounded(model.lm_head.weight, "int8", Surroundings(act=ActSpec(dtype="int8", outlier=1.0)))
    with pytest.raises(ExportError, match="one threshold of outliers for all weights"):
        ptqc.export(model, "bitsandbytes", tmp_path / "mixed")


def test_a_threshold_that_is_none():
    with pytest.raises(CheckpointError, match="no threshold"):
        BitsAndBytes.of_config({"llm_int8_threshold": "six"}, "config.json")
