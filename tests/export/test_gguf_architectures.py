import gguf
import pytest
import torch
from gguf import MODEL_TENSOR
from torch import nn

from ptqc.codegen.export._gguf_architectures import (
    ARCHITECTURES,
    architecture_of,
    interleaved_rows,
    metadata,
    placements,
)
from ptqc.codegen.exporters import export
from ptqc.errors import ExportError
from tests.export._models import llama_logits, relative, small_model, stored


def test_rows_of_each_head_are_interleaved():
    assert interleaved_rows(12, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    for rows, heads in ((4, 4), (12, 5), (12, 0)):
        with pytest.raises(ExportError, match="cannot be rotated"):
            interleaved_rows(rows, heads)


def test_rotating_neighbours_after_interleaving_is_rotating_halves_before():
    rows, angles = interleaved_rows(8, 1), torch.tensor([0.3, 0.5, 0.7, 1.1])
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    halves = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones(4), angles)
    neighbours = torch.view_as_complex(x[rows].view(4, 2)) * torch.polar(torch.ones(4), angles)
    assert torch.allclose(torch.view_as_real(neighbours).flatten(), torch.cat([halves.real, halves.imag])[rows])


def test_only_queries_and_keys_change_their_order_and_codes_follow():
    model = small_model()
    layer = model.model.layers[0].self_attn
    plain = layer.k_proj.weight.detach().clone()
    layer.k_proj.weight = nn.Parameter(stored(plain, "int4g32"), requires_grad=False)
    placed = {at.name: at for at in placements(architecture_of(model), model)}
    assert {at.role for at in placed.values() if at.rows is not None} == {MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K}
    at = placed["model.layers.0.self_attn.k_proj.weight"]
    expected = layer.k_proj.weight.dequantize().view(2, 2, 8, 64).transpose(1, 2).reshape(32, 64)
    assert at.stored_name == "blk.0.attn_k.weight"
    assert torch.equal(at.arranged().dequantize(), expected)
    assert at.arranged().spec == layer.k_proj.weight.spec


def test_tied_weights_are_placed_once_and_the_model_is_not_touched():
    model = small_model(tie_word_embeddings=True)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    names = [at.stored_name for at in placements(architecture_of(model), model)]
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_every_name_is_one_of_the_architecture():
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        model = small_model(family, **({"sliding_window": None} if family == "Mistral" else {}))
        architecture = architecture_of(model)
        kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        assert {at.role for at in placements(architecture, model)} <= set(gguf.MODEL_TENSORS[kind])


def test_metadata_come_from_the_configuration():
    model = small_model()
    found = {row.key: row.value for row in metadata(architecture_of(model), model.config)}
    assert found["llama.block_count"] == 2
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 16
    assert found["llama.rope.freq_base"] == 10000.0
    assert not any("scaling" in key for key in found)


def test_an_unknown_family_is_an_error_that_names_the_known_ones():
    with pytest.raises(ExportError, match=r'cannot describe "gpt2" yet.*llama, mistral'):
        architecture_of(small_model("GPT2", n_layer=1, n_embd=64, n_head=4))
    with pytest.raises(ExportError, match=r"cannot describe a Linear"):
        architecture_of(nn.Linear(2, 2))


def test_a_setting_that_the_other_side_ignores_is_an_error():
    with pytest.raises(ExportError, match=r"hidden_act='silu', this model has 'gelu'"):
        architecture_of(small_model(hidden_act="gelu"))
    with pytest.raises(ExportError, match=r"sliding_window=None, this model has 64"):
        architecture_of(small_model("Mistral", sliding_window=64))


def test_weights_without_a_place_are_an_error():
    model = small_model()
    model.model.layers[0].mlp.adapter = nn.Linear(4, 4)
    with pytest.raises(ExportError, match=r"no place for model.layers.0.mlp.adapter.weight.*\(2 weights\)"):
        placements(ARCHITECTURES["llama"], model)


VARIANTS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "head-32": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5, "num_key_value_heads": 4}),
    "gpt-neox-sequential": ("GPTNeoX", {"use_parallel_residual": False, "num_key_value_heads": 4}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma3": ("Gemma3Text", {"query_pre_attn_scalar": 16, "sliding_window": 64, "num_hidden_layers": 7}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0,
        "original_max_position_embeddings": 128}}),
    "yarn-attention": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0,
        "original_max_position_embeddings": 128, "attention_factor": 1.3}}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same(tmp_path, reference_folder, variant):
    family, changes = VARIANTS[variant]
    model = small_model(family, **changes)
    export(model, "gguf", tmp_path / "m.gguf", quant="F32", tokenizer=reference_folder, name="small")
    ids = torch.randint(2, 4096, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    # GELU is a table of float16 numbers in llama.cpp.
    bound = 1e-3 if family.startswith(("Gemma", "Starcoder", "GPT")) else 1e-5
    assert relative(llama_logits(tmp_path / "m.gguf", ids.tolist()), expected) < bound
