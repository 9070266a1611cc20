import pytest
import torch
from torch import nn

import ptqc
from ptqc.codegen.export._gguf_architectures import architecture_of, interleaved_rows, metadata
from ptqc.codegen.exporters import export
from ptqc.errors import ExportError
from tests.export._models import EXPERTS, llama_logits, relative, small_model


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


def test_metadata_come_from_the_configuration():
    model = small_model()
    found = {row.key: row.value for row in metadata(architecture_of(model), model.config)}
    assert found["llama.block_count"] == 2
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 16
    assert found["llama.rope.freq_base"] == 10000.0
    assert not any("scaling" in key for key in found)


def test_an_unknown_family_is_an_error_that_names_the_known_ones():
    with pytest.raises(ExportError, match=r'cannot describe "opt" yet.*llama, .*mistral'):
        architecture_of(small_model("OPT", ffn_dim=64, word_embed_proj_dim=64))
    with pytest.raises(ExportError, match=r"cannot describe a Linear"):
        architecture_of(nn.Linear(2, 2))


def test_a_setting_that_the_other_side_ignores_is_an_error():
    with pytest.raises(ExportError, match=r"hidden_act='silu', this model has 'gelu'"):
        architecture_of(small_model(hidden_act="gelu"))
    with pytest.raises(ExportError, match=r"sliding_window=None, this model has 64"):
        architecture_of(small_model("Mistral", sliding_window=64))


SCALES = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.1,
}
ROUTED = EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
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
    "mixtral": ("Mixtral", EXPERTS),
    "qwen2-moe": ("Qwen2Moe", EXPERTS),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "olmoe": ("Olmoe", EXPERTS | {"num_key_value_heads": 4}),
    "granite-moe": ("GraniteMoe", EXPERTS | SCALES),
    "glm4-moe": ("Glm4Moe", ROUTED | {"use_qk_norm": True, "attention_bias": True}),
    "dots1": ("Dots1", ROUTED | {"num_key_value_heads": 4}),
    "hunyuan-moe": ("HunYuanMoEV1", EXPERTS | {"moe_topk": 2}),
    "minimax-m2": ("MiniMaxM2", EXPERTS),
    "gpt2": ("GPT2", {}),
    "gpt2-inner": ("GPT2", {"n_inner": 96}),
    "gpt-bigcode": ("GPTBigCode", {}),
    "olmo": ("Olmo", {}),
    "olmo-clamped": ("Olmo", {"clip_qkv": 0.5}),
    "olmo3": ("Olmo3", {"sliding_window": 64, "num_hidden_layers": 5}),
    "phi": ("Phi", {}),
    "stablelm": ("StableLm", {}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "nemotron": ("Nemotron", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 64, "num_hidden_layers": 5}),
    "granite": ("Granite", SCALES),
    "arcee": ("Arcee", {}),
    "seed-oss": ("SeedOss", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "glm4": ("Glm4", {}),
    "glm4-unbiased": ("Glm4", {"attention_bias": False}),
    "ernie": ("Ernie4_5", {}),
    "ernie-moe": ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
        "moe_layer_start_index": 1, "moe_num_shared_experts": 2}),
    "hunyuan": ("HunYuanDenseV1", {}),
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
    has_gelu = any("gelu" in str(getattr(model.config, name, "")) for name in ("hidden_act", "hidden_activation"))
    has_gelu |= "gelu" in getattr(model.config, "activation_function", "")
    assert relative(llama_logits(tmp_path / "m.gguf", ids.tolist()), expected) < (1e-3 if has_gelu else 1e-5)
    with torch.no_grad():
        loaded = ptqc.load(tmp_path / "m.gguf")(ids[None], use_cache=False).logits[0]
    assert relative(loaded, expected) < 1e-5
