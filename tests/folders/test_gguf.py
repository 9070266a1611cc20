"""GGUF files as models: what was written comes back, and hostile files are errors."""

import gguf
import pytest
import torch

import ptqc
from ptqc.codegen.exporters import export
from ptqc.errors import CheckpointError
from ptqc.qtensor import QuantTensor
from tests.export._models import EXPERTS, quantized, relative, small_model
from tests.export.test_gguf_tokenizer import byte_level

IDS = torch.arange(2, 40)[None]
SMALL = {"vocab_size": 700}
WIDE = {"vocab_size": 700, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": None}), ("Qwen2", {}), ("Qwen3", {}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}),
        ("Llama", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
        }}),
        ("Llama", {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }}),
    ],
)  # fmt: skip
def test_float_models_come_back_exactly(tmp_path, tokenizer, family, changes):
    model = small_model(family, **(SMALL | changes))
    export(model, "gguf", tmp_path / "m.gguf", quant="F32", tokenizer=tokenizer)
    loaded = ptqc.load(tmp_path / "m.gguf")
    assert relative(logits(loaded), logits(model)) < 1e-5
    assert loaded.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("quant", [
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0",
    "TQ2_0",
])  # fmt: skip
def test_codes_come_back_and_go_out_again(tmp_path, tokenizer, quant):
    export(small_model(**WIDE), "gguf", tmp_path / "a.gguf", quant=quant, tokenizer=tokenizer)
    model = ptqc.load(tmp_path / "a.gguf")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    up = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(up, QuantTensor)
    expected = gguf.quants.dequantize(read["blk.0.ffn_up.weight"].data, read["blk.0.ffn_up.weight"].tensor_type)
    assert torch.equal(up.dequantize(), torch.from_numpy(expected.copy()))
    assert torch.isfinite(logits(model)).all()
    report = export(model, "gguf", tmp_path / "b.gguf", quant=quant, tokenizer=tokenizer)
    assert {tensor.fate for tensor in report.tensors} == {"lossless"}
    again = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert all((again[name].data == tensor.data).all() for name, tensor in read.items())


def test_a_quantized_model_keeps_its_numbers(tmp_path, tokenizer):
    model = quantized(small_model(**SMALL), "int4g32")
    export(model, "gguf", tmp_path / "m.gguf", tokenizer=tokenizer)
    loaded = ptqc.load(tmp_path / "m.gguf")
    assert torch.equal(logits(loaded), logits(model))


def test_the_dtype_is_that_of_floats(tmp_path, tokenizer):
    export(small_model(**SMALL), "gguf", tmp_path / "m.gguf", quant="Q4_0", tokenizer=tokenizer)
    model = ptqc.load(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def rewritten(source, target, changes=None, without=(), tensors=None):
    """A copy with other metadata, without some tensors, and with others in their place."""
    reader, keys = gguf.GGUFReader(source), dict(changes or {})
    writer = gguf.GGUFWriter(target, keys.pop("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and not name.startswith("tokenizer."):
            value, kind = keys.pop(name, field.contents()), field.types[0]
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        tensor = (tensors or {}).get(tensor.name, tensor)
        if tensor.name not in without:
            writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "without", "said"),
    [
        ({"general.architecture": "resnet"}, (), "is of architecture 'resnet'; those that .* read: .*gemma, .*llama"),
        ({"llama.block_count": 4_000_000_000}, (), "announces 4000000000 layers and holds tensors of 2"),
        ({"llama.embedding_length": 4_000_000_000}, (), "no tensor in it is as wide"),
        ({"llama.feed_forward_length": 4_000_000_000}, (), "no tensor in it is as wide"),
        ({"llama.feed_forward_length": 64}, (), "of shape .* not"),
        ({"llama.attention.head_count": 0}, (), "cannot build|describes no"),
        ({"llama.attention.head_count": 3}, (), "of shape|describes no"),
        ({"llama.attention.key_length": 2_000_000_000}, (), "no tensor in it is as wide"),
        ({}, ("token_embd.weight",), "has no token_embd.weight"),
        ({}, ("blk.1.ffn_up.weight",), "lacks blk.1.ffn_up.weight"),
        ({}, ("output_norm.weight",), "lacks output_norm.weight"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, tokenizer, changes, without, said):
    export(small_model(**SMALL), "gguf", tmp_path / "a.gguf", quant="Q8_0", tokenizer=tokenizer)
    rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", changes, without)
    with pytest.raises(CheckpointError, match=said):
        ptqc.load(tmp_path / "b.gguf")


def test_a_parameter_whose_tensors_have_different_types_becomes_floats(tmp_path, tokenizer):
    model = small_model("Mixtral", **SMALL, **EXPERTS)
    for quant in ("Q8_0", "F16"):
        export(model, "gguf", tmp_path / f"{quant}.gguf", quant=quant, tokenizer=tokenizer)
    half = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "F16.gguf").tensors if "ffn_up" in tensor.name}
    rewritten(tmp_path / "Q8_0.gguf", tmp_path / "mixed.gguf", tensors=half)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    mixed, coded, floats = (
        ptqc.load(tmp_path / f"{file}.gguf").get_parameter(name) for file in ("mixed", "Q8_0", "F16")
    )
    assert isinstance(coded, QuantTensor) and not isinstance(mixed, QuantTensor)
    assert torch.equal(mixed[:, :96], coded.dequantize()[:, :96])
    assert torch.equal(mixed[:, 96:], floats[:, 96:])


@pytest.mark.parametrize(("family", "changes", "kind"), [
    ("Mistral", {"sliding_window": None}, "llama"), ("Mixtral", EXPERTS, "mixtral"), ("Olmo2", {}, "olmo2"),
    ("Olmo3", {"sliding_window": 64, "num_hidden_layers": 4}, "olmo3"),
])  # fmt: skip
def test_families_of_one_name_are_told_apart_by_their_keys(tmp_path, tokenizer, family, changes, kind):
    model = small_model(family, **(SMALL | changes))
    export(model, "gguf", tmp_path / "m.gguf", quant="F32", tokenizer=tokenizer)
    assert ptqc.load(tmp_path / "m.gguf").config.model_type == kind
