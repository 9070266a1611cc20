import gguf
import pytest
import torch
from torch import nn

import ptqc
from ptqc.codegen.exporters import export
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor
from tests.export._models import EXPERTS, decoded, llama_logits, quantized, relative, small_model, stored
from tests.export.test_gguf_tokenizer import byte_level

resource = pytest.importorskip("resource")


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def types_of(path):
    return {name: tensor.tensor_type.name for name, tensor in tensors_of(path).items()}


def test_float32_comes_back_exactly(tmp_path, reference_folder):
    model = small_model()
    report = export(model, "gguf", tmp_path / "m.gguf", quant="F32", tokenizer=reference_folder)
    for name, numbers in decoded(tmp_path / "m.gguf", model).items():
        assert torch.equal(numbers, model.get_parameter(name)), name
    assert {tensor.fate for tensor in report.tensors} == {"lossless"}
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size


@pytest.mark.parametrize(("quant", "step"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 127), ("Q4_0", 1 / 7)])
def test_every_weight_comes_back_near(tmp_path, reference_folder, quant, step):
    model = small_model()
    export(model, "gguf", tmp_path / "m.gguf", quant=quant, tokenizer=reference_folder)
    for name, numbers in decoded(tmp_path / "m.gguf", model).items():
        weight = model.get_parameter(name)
        assert (numbers - weight).abs().max() <= step * weight.abs().max(), name


WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1, "vocab_size": 700}
FAMILIES = {
    "GPT2": WIDE,
    "GPT2 odd": {"hidden_size": 96, "n_inner": 160, "vocab_size": 700, "num_hidden_layers": 1},
    "Mixtral": WIDE | EXPERTS,
    "Mixtral odd": EXPERTS | {"num_hidden_layers": 1, "vocab_size": 700},
    "Qwen2Moe": WIDE | EXPERTS | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 288},
    "Qwen3Moe": WIDE | EXPERTS | {"moe_intermediate_size": 256, "norm_topk_prob": True},
    "Olmoe": WIDE | EXPERTS | {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0"])
def test_experts_and_transposed_weights_come_back_as_the_package_decodes_them(tmp_path, quant, family):
    model = small_model(family.removesuffix(" odd"), **FAMILIES[family])
    tokenizer = byte_level()
    export(model, "gguf", tmp_path / "a.gguf", quant=quant, tokenizer=tokenizer, name="a")
    found, loaded = decoded(tmp_path / "a.gguf", model), ptqc.load(tmp_path / "a.gguf")
    for name, weight in loaded.named_parameters():
        numbers = weight.dequantize() if isinstance(weight, QuantTensor) else weight
        assert torch.equal(numbers, found[name]), name
        assert relative(numbers, model.get_parameter(name)) < 0.1, name
    packed = [name for name, weight in loaded.named_parameters() if weight.ndim == 3]
    assert all(isinstance(loaded.get_parameter(name), QuantTensor) for name in packed)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        logits = loaded(ids, use_cache=False).logits
        for name, weight in model.named_parameters():
            weight.copy_(found[name])
        assert relative(logits, model(ids, use_cache=False).logits) < 1e-5
    report = export(loaded, "gguf", tmp_path / "b.gguf", quant=quant, tokenizer=tokenizer, name="a")
    assert {tensor.fate for tensor in report.tensors} == {"lossless"}
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_rows_that_no_superblock_divides_fall_back_in_experts_too(tmp_path):
    model = small_model("Mixtral", **FAMILIES["Mixtral odd"])
    report = export(model, "gguf", tmp_path / "m.gguf", quant="Q4_K_M", tokenizer=byte_level())
    found = types_of(tmp_path / "m.gguf")
    assert found["blk.0.ffn_gate_exps.weight"] == found["blk.0.ffn_up_exps.weight"] == "Q5_0"
    assert found["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert found["blk.0.ffn_gate_inp.weight"] == "F32"
    assert any("no block of Q4_K divides their rows" in note for note in report.notes)


@pytest.mark.parametrize("family", ["GPT2", "Mixtral"])
def test_quantized_models_with_experts_and_transposed_weights_keep_their_codes(tmp_path, family):
    model = small_model(family, **FAMILIES[family])
    ptqc.quantize(model, "rtn", spec="int4g32", progress=False)
    stored_ones = [name for name, weight in model.named_parameters() if isinstance(weight, QuantTensor)]
    assert len(stored_ones) == (4 if family == "GPT2" else 6)
    report = export(model, "gguf", tmp_path / "m.gguf", quant="Q4_0", tokenizer=byte_level())
    fates = {(tensor.name, tensor.stored_as, tensor.fate) for tensor in report.tensors if tensor.name in stored_ones}
    assert fates == {(name, "Q4_0", "lossless") for name in stored_ones}
    found = decoded(tmp_path / "m.gguf", model)
    for name in stored_ones:
        assert torch.equal(found[name], model.get_parameter(name).dequantize()), name


@pytest.mark.parametrize("spec", ["nf4g64", "int8t", "int4g32z-f32"])
def test_stored_experts_on_another_grid_are_encoded_anew(tmp_path, spec):
    model = small_model("Mixtral", **FAMILIES["Mixtral"])
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(stored(experts.gate_up_proj, spec), requires_grad=False)
    report = export(model, "gguf", tmp_path / "m.gguf", quant="Q8_0", tokenizer=byte_level())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert [tensor.fate for tensor in report.tensors if tensor.name == name] == ["requantized"] * 2
    assert relative(decoded(tmp_path / "m.gguf", model)[name], experts.gate_up_proj.dequantize()) < 0.01


def test_every_expert_has_its_own_importance(tmp_path):
    model = small_model("Mixtral", **FAMILIES["Mixtral"])
    name, stack = "model.layers.0.mlp.experts.down_proj", torch.ones(4, 256)
    export(model, "gguf", tmp_path / "plain.gguf", quant="Q4_0", tokenizer=byte_level(), importance={name: stack})
    stack[2, :16] = 100.0
    export(model, "gguf", tmp_path / "own.gguf", quant="Q4_0", tokenizer=byte_level(), importance={name: stack})
    plain, own = decoded(tmp_path / "plain.gguf", model)[name], decoded(tmp_path / "own.gguf", model)[name]
    weight = model.get_parameter(name).detach()
    worse = [not torch.equal(plain[expert], own[expert]) for expert in range(4)]
    assert worse == [False, False, True, False]
    important = (slice(2, 3), slice(None), slice(16))
    assert (own - weight)[important].norm() < (plain - weight)[important].norm()


def test_types_of_a_q4_0_file(tmp_path, reference_folder):
    export(small_model(), "gguf", tmp_path / "m.gguf", quant="Q4_0", tokenizer=reference_folder)
    found = types_of(tmp_path / "m.gguf")
    assert found["token_embd.weight"] == found["blk.1.ffn_down.weight"] == "Q4_0"
    assert found["output.weight"] == "Q8_0"
    assert found["output_norm.weight"] == found["blk.0.attn_norm.weight"] == "F32"
    tied = small_model(tie_word_embeddings=True)
    export(tied, "gguf", tmp_path / "tied.gguf", quant="Q4_0", tokenizer=reference_folder)
    assert types_of(tmp_path / "tied.gguf")["token_embd.weight"] == "Q8_0"


def test_rows_that_no_block_divides_fall_back_to_f16_and_are_noted(tmp_path, reference_folder):
    report = export(
        small_model(intermediate_size=72), "gguf", tmp_path / "m.gguf", quant="Q8_0", tokenizer=reference_folder
    )
    found = types_of(tmp_path / "m.gguf")
    assert found["blk.0.ffn_down.weight"] == "F16"
    assert found["blk.0.ffn_up.weight"] == "Q8_0"
    first = "model.layers.0.mlp.down_proj.weight"
    assert report.notes == (f"2 weights as F16, no block of Q8_0 divides their rows: {first} ...",)


def test_a_quantized_model_is_carried_over_bit_for_bit(tmp_path, reference_folder):
    model = quantized(small_model(), "int4g32")
    report = export(model, "gguf", tmp_path / "m.gguf", quant="Q4_0", tokenizer=reference_folder)
    weights = decoded(tmp_path / "m.gguf", model)
    fates = {tensor.name: tensor.fate for tensor in report.tensors}
    for index in range(2):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{part}.weight"
            assert fates[name] == "lossless"
            assert torch.equal(weights[name], model.get_parameter(name).dequantize()), name
    assert fates["lm_head.weight"] == "converted"


def test_a_head_on_the_grid_stays_in_the_type_asked_for(tmp_path, reference_folder):
    model = small_model()
    model.lm_head.weight = nn.Parameter(stored(model.lm_head.weight, "int4g32"), requires_grad=False)
    export(model, "gguf", tmp_path / "m.gguf", quant="Q4_0", tokenizer=reference_folder)
    assert types_of(tmp_path / "m.gguf")["output.weight"] == "Q4_0"


def test_another_grid_is_requantized_and_noted(tmp_path, reference_folder):
    model = quantized(small_model(), "nf4g32")
    report = export(model, "gguf", tmp_path / "m.gguf", quant="Q4_0", tokenizer=reference_folder)
    assert sum(tensor.fate == "requantized" for tensor in report.tensors) == 14
    assert report.notes == (
        "14 weights stored as nf4g32 into Q4_0, a grid it lacks: decoded and encoded again",
        "1 weights as Q8_0, no block of Q6_K divides their rows: lm_head.weight ...",
    )


def test_without_a_request_every_weight_stays_as_it_is(tmp_path, reference_folder):
    model = quantized(small_model(), "int8g32").half()
    report = export(model, "gguf", tmp_path / "m.gguf", tokenizer=reference_folder)
    found = types_of(tmp_path / "m.gguf")
    assert found["blk.0.ffn_up.weight"] == "Q8_0"
    assert found["output.weight"] == "F16"
    assert {tensor.fate for tensor in report.tensors} == {"lossless"}


def test_metadata_and_vocabulary_are_written(tmp_path, reference_folder):
    export(small_model(), "gguf", tmp_path / "m.gguf", quant="Q8_0", tokenizer=reference_folder, name="small")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {key: fields[key].contents() for key in fields}
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == "small"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["llama.embedding_length"] == 64
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert len(found["tokenizer.ggml.tokens"]) == found["llama.vocab_size"] == 4096
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.eos_token_id"] == 1


def test_a_chat_template_goes_along(tmp_path, reference_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference_folder)
    tokenizer.chat_template = "{{ messages }}"
    export(small_model(), "gguf", tmp_path / "m.gguf", quant="F16", tokenizer=tokenizer)
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"].contents() == "{{ messages }}"


def test_same_model_same_bytes(tmp_path, reference_folder):
    for name in ("a.gguf", "b.gguf"):
        export(small_model(), "gguf", tmp_path / name, quant="Q4_0", tokenizer=reference_folder)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_model_is_not_changed(tmp_path, reference_folder):
    model = quantized(small_model(), "int4g32")
    before = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters()}
    export(model, "gguf", tmp_path / "m.gguf", quant="Q8_0", tokenizer=reference_folder)
    for name, weight in model.named_parameters():
        same, value = before[name]
        assert weight is same
        assert torch.equal(weight, value)


def test_a_failing_write_leaves_nothing(tmp_path, reference_folder):
    """A real one: the system refuses files above the limit, in the middle of the tensors."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot write"):
            export(small_model(), "gguf", tmp_path / "m.gguf", quant="F32", tokenizer=reference_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_weight_leaves_nothing_and_is_named(tmp_path, reference_folder):
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r'"model.layers.1.mlp.up_proj.weight" holds NaN'):
        export(model, "gguf", tmp_path / "m.gguf", quant="Q8_0", tokenizer=reference_folder)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_before_writing(tmp_path, reference_folder):
    with pytest.raises(ExportError, match=r"no 'Q9_0'; quant may be F32, F16, BF16, Q8_0, Q4_0"):
        export(small_model(), "gguf", tmp_path / "m.gguf", quant="Q9_0", tokenizer=reference_folder)
    with pytest.raises(ExportError, match=r"holds its tokenizer: pass tokenizer="):
        export(small_model(), "gguf", tmp_path / "m.gguf", quant="Q8_0")
    model = small_model()
    model.model.norm.weight = nn.Parameter(torch.ones(64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ExportError, match=r'"model.norm.weight": it holds torch.int8'):
        export(model, "gguf", tmp_path / "m.gguf", quant="Q8_0", tokenizer=reference_folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quant", "spec"), [("F16", None), ("Q8_0", None), ("Q4_0", None), ("Q4_0", "int4g32"), ("Q8_0", "int8g32")]
)
def test_llama_cpp_agrees_on_the_reference_model(tmp_path, reference_folder, reference_model, quant, spec):
    """Its products round activations to 8 bits, so logits agree to some percent; see benchmarks/gguf_llamacpp.py."""
    model = reference_model if spec is None else quantized(reference_model, spec)
    export(model, "gguf", tmp_path / "m.gguf", quant=quant, tokenizer=reference_folder)
    weights = decoded(tmp_path / "m.gguf", model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(weights[f"{name}.weight"], requires_grad=False)
    ids = torch.randint(2, 4096, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    assert relative(llama_logits(tmp_path / "m.gguf", ids.tolist()), expected) < (2e-3 if quant == "F16" else 3e-2)
