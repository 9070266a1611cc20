"""compressed-tensors: bytes made by hand, and transformers with the package itself."""

import pytest
import torch
import transformers
from torch import nn

import ptqc
from ptqc.act_spec import ActSpec
from ptqc.codegen.dialects.compressed_tensors import CompressedTensors
from ptqc.errors import CheckpointError
from ptqc.surroundings import Surroundings
from tests.export._folders import UP, config_in, exported, matrix, ordered, quantized, rounded
from tests.export.test_gptq import stream, weight
from tests.tiny import logits

FP8 = ActSpec(dtype="fp8e4m3")
INT8, STATIC = ActSpec(dtype="int8"), ActSpec(dtype="int8", scale="tensor", is_static=True)


def scale(_):
    return torch.tensor(0.05)


def opened(folder, dtype=torch.float32, **options):
    """The folder in transformers with compressed-tensors."""
    pytest.importorskip("compressed_tensors")
    if options:
        options = {"quantization_config": transformers.CompressedTensorsConfig(**options)}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    return model


@pytest.mark.parametrize(
    ("spec", "options", "tolerance"),
    [
        ("int4g32", {}, 1e-6),
        ("int8", {}, 1e-6),
        ("int3g32", {}, 1e-6),
        ("int4g32z", {"dequantize": True}, 2e-3),
        ("int8z", {"dequantize": True}, 2e-3),
        ("fp8e4m3", {}, 1e-6),
        ("fp8e4m3t", {}, 1e-6),
    ],
)
def test_transformers_opens_our_folder(tmp_path, spec, options, tolerance):
    model = quantized(spec)
    ptqc.export(model, "compressed-tensors", tmp_path / "out")
    found, expected = logits(opened(tmp_path / "out", **options)), logits(model)
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("spec", "act", "extras", "tolerance"),
    [
        ("int8", STATIC, {"act_scale": scale}, 1e-6),
        ("fp8e4m3", FP8, {}, 1e-6),
        ("fp8e4m3t", ActSpec(dtype="fp8e4m3", scale="tensor", is_static=True), {"act_scale": scale}, 1e-6),
        ("int8", INT8, {}, 0.02),  # the package divides by 127.5 where vLLM and we divide by 127
    ],
)
def test_inputs_are_quantized_as_ours(tmp_path, spec, act, extras, tolerance):
    model = quantized(spec, Surroundings(act=act), **extras)
    ptqc.export(model, "compressed-tensors", tmp_path / "out")
    found, expected = logits(opened(tmp_path / "out")), logits(model)
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_several_specs_are_several_groups(tmp_path):
    model = quantized("int4g32")
    layer = model.model.layers[1]
    layer.mlp.down_proj.weight = rounded(layer.mlp.down_proj.weight.dequantize(), "int8", Surroundings(act=INT8))
    layer.self_attn.o_proj.weight = nn.Parameter(layer.self_attn.o_proj.weight.dequantize())
    exported(model, "compressed-tensors", tmp_path / "out")
    config = config_in(tmp_path / "out")
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    assert config["config_groups"]["group_1"]["targets"] == ["model.layers.1.mlp.down_proj"]
    assert config["ignore"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    ours = ptqc.load(tmp_path / "out")
    assert [str(w.surroundings.act) for w in ours.parameters() if isinstance(w, ptqc.QuantTensor)].count("float") == 12
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=0)
    found, expected = logits(opened(tmp_path / "out")), logits(model)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_made_by_hand(bits):
    codes = torch.randint(0, 2**bits, (20, 48), generator=torch.Generator().manual_seed(0))
    zero = torch.randint(0, 2**bits, (20, 3), generator=torch.Generator().manual_seed(1)).float()
    tails = CompressedTensors().write(weight(codes, bits, 16, zero))
    assert tails["weight_packed"][7].tolist() == stream(codes[7], bits)
    assert tails["weight_zero_point"][:, 2].tolist() == stream(zero[:, 2], bits)
    assert tails["weight_scale"][7].tolist() == [1.0, 2.0, 3.0]
    assert tails["weight_shape"].tolist() == [20, 48]


def test_8_bit_codes_are_signed():
    tails = CompressedTensors().write(quantized("int8", Surroundings(act=INT8)).get_submodule(UP).weight)
    assert tails["weight"].dtype == torch.int8
    assert tails["weight"].min() < -100 and tails["weight"].max() > 100


def test_the_package_packs_the_same_words():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in (3, 4, 8):
        codes = torch.randint(0, 2**bits, (16, 64), generator=torch.Generator().manual_seed(0))
        theirs = helpers.pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
        assert torch.equal(CompressedTensors().write(weight(codes, bits, 32))["weight_packed"], theirs)


def test_act_order_has_no_place_unless_it_is_asked_for(tmp_path):
    model = ordered("int4g32")
    reason = CompressedTensors().refuses(model.get_submodule(UP).weight)
    assert "dropped weight_g_idx (option g_idx=True: vLLM still reads it)" in reason
    tensors = exported(model, "compressed-tensors", tmp_path / "out", g_idx=True)
    assert tensors[f"{UP}.weight_g_idx"].bincount().tolist() == [32, 32]
    assert config_in(tmp_path / "out")["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    torch.testing.assert_close(logits(ptqc.load(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


def test_mxfp4_is_copied():
    weight = matrix(64, 8, "mxfp4")["up"].weight
    tails = CompressedTensors().write(weight)
    assert torch.equal(tails["weight_packed"], weight.codes)
    assert tails["weight_scale"].dtype == torch.uint8
    assert weight.scale.float()[0, 0] == 2.0 ** (tails["weight_scale"][0, 0].item() - 127)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "marlin-24"}, "format marlin-24 is not known"),
        ({"config_groups": []}, "no table of tables"),
        ({"config_groups": {"a": {"targets": "Linear"}}}, "must be a list of names"),
        ({"config_groups": {"a": {"targets": ["re:(a*)*b"]}}}, "is not read; name the modules"),
        ({"config_groups": {"a": {"targets": ["re:("]}}}, "is not read; name the modules"),
        ({"config_groups": {"a": {"targets": [], "input_activations": {"num_bits": 4}}}}, "4 bits, None, None"),
        ({"config_groups": {"a": {"targets": [], "input_activations": 8}}}, "no table"),
        (
            {
                "config_groups": {
                    "a": {
                        "targets": [],
                        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False},
                    }
                }
            },
            "zero points",
        ),
    ],
)
def test_what_is_not_known_is_named(change, fault):
    config = {"format": "pack-quantized", "config_groups": {}} | change
    with pytest.raises(CheckpointError, match=fault):
        CompressedTensors.of_config(config, "config.json")


def test_targets_choose_what_happens_to_inputs():
    act = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    groups = {
        "all": {"targets": ["Linear"]},
        "one": {"targets": ["re:.*down_proj$", "a.b"], "input_activations": act},
    }
    acts = CompressedTensors.of_config({"config_groups": groups}, "config.json").acts
    found = [next(str(entry.act) for entry in acts if entry.has(name)) for name in ("x.down_proj", "a.b", "a.c")]
    assert found == ["int8-token", "int8-token", "float"]
