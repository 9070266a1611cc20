"""What each family of checkpoints needs in a GGUF file: metadata and order of rows.

A family is a row of ARCHITECTURES, found by the `model_type` of the configuration.

llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates the two halves against each other; for the
families whose kernel does so, rows of the query and key projections are interleaved: [0, d/2, 1, d/2 + 1, ...].
"""

from collections.abc import Callable
from typing import Any

import torch
from gguf import MODEL_TENSOR, ExpertGatingFuncType, Keys
from torch import Tensor, nn

from ptqc.codegen.export._gguf_family import BOOL, FLOAT, UINT, Architecture, Field, Metadata, Order
from ptqc.codegen.export._gguf_rotary import rotary_fields
from ptqc.errors import ExportError

__all__ = ["ARCHITECTURES", "architecture_of", "interleaved_rows", "metadata"]


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotated(config: Any) -> int:
    """Rotated channels of a head."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head_dim(config) * (parameters.get("partial_rotary_factor") or 1))


def _halves_to_neighbours(heads: str) -> Order:
    """Rows of every head, rotation by halves into rotation by neighbours. heads: config name of their number."""
    return lambda rows, config: interleaved_rows(rows, getattr(config, heads))


def _heads_to_kinds(rows: int, config: Any) -> Tensor:
    """Query, key and value of every head side by side -> all queries, all keys, all values."""
    heads = config.num_attention_heads
    _check_heads(rows, heads, 3)
    return torch.arange(rows).view(heads, 3, rows // heads // 3).transpose(0, 1).reshape(-1)


_COMMON = (
    Field(Keys.LLM.VOCAB_SIZE, UINT, "vocab_size"),
    Field(Keys.LLM.CONTEXT_LENGTH, UINT, "max_position_embeddings"),
    Field(Keys.LLM.EMBEDDING_LENGTH, UINT, "hidden_size"),
    Field(Keys.LLM.BLOCK_COUNT, UINT, "num_hidden_layers"),
    Field(Keys.Attention.HEAD_COUNT, UINT, "num_attention_heads"),
)
_SIZES = (
    *_COMMON,
    Field(Keys.LLM.FEED_FORWARD_LENGTH, UINT, "intermediate_size"),
    Field(Keys.Attention.HEAD_COUNT_KV, UINT, "num_key_value_heads"),
    Field(Keys.Attention.KEY_LENGTH, UINT, head_dim, "head_dim"),
    Field(Keys.Attention.VALUE_LENGTH, UINT, head_dim),
    Field(Keys.Rope.DIMENSION_COUNT, UINT, _rotated),
)
_DECODER = (*_SIZES, Field(Keys.Attention.LAYERNORM_RMS_EPS, FLOAT, "rms_norm_eps"))
_SLIDING = Field(Keys.Attention.SLIDING_WINDOW, UINT, "sliding_window")
_FINAL_CAP = Field(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, FLOAT, "final_logit_softcapping")
_ATTENTION_CAP = Field(Keys.LLM.ATTN_LOGIT_SOFTCAPPING, FLOAT, "attn_logit_softcapping")
_ORIGINAL_CONTEXT = Field(Keys.Rope.SCALING_ORIG_CTX_LEN, UINT, "original_max_position_embeddings")
_LOGIT_SCALE = Field(Keys.LLM.LOGIT_SCALE, FLOAT, "logit_scale")
_IS_PARALLEL = Field(Keys.LLM.USE_PARALLEL_RESIDUAL, BOOL, "use_parallel_residual")
_CLAMP = Field(Keys.Attention.CLAMP_KQV, FLOAT, "clip_qkv")
_ONE_KEY = Field(Keys.Attention.HEAD_COUNT_KV, UINT, lambda config: 1)
_GPT2 = (
    *_COMMON,
    Field(Keys.LLM.FEED_FORWARD_LENGTH, UINT, lambda config: config.n_inner or 4 * config.n_embd, "n_inner"),
    Field(Keys.Attention.LAYERNORM_EPS, FLOAT, "layer_norm_epsilon"),
)
_SCALES = (
    Field(Keys.Attention.SCALE, FLOAT, "attention_multiplier"),
    Field(Keys.LLM.EMBEDDING_SCALE, FLOAT, "embedding_multiplier"),
    Field(Keys.LLM.RESIDUAL_SCALE, FLOAT, "residual_multiplier"),
    Field(Keys.LLM.LOGIT_SCALE, FLOAT, "logits_scaling"),
)
_EXPERT_WIDTH = Field(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, UINT, "moe_intermediate_size")
_AS_WIDE = Field(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, UINT, "intermediate_size")
_SHARED_WIDTH = Field(Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, UINT, "shared_expert_intermediate_size")
_BY_SIGMOID = Field(Keys.LLM.EXPERT_GATING_FUNC, UINT, lambda config: int(ExpertGatingFuncType.SIGMOID))
_ROUTED = (
    _EXPERT_WIDTH,
    _BY_SIGMOID,
    Field(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, UINT, "first_k_dense_replace"),
    Field(Keys.LLM.EXPERT_SHARED_COUNT, UINT, "n_shared_experts"),
    Field(Keys.LLM.EXPERT_WEIGHTS_SCALE, FLOAT, "routed_scaling_factor"),
    Field(Keys.LLM.EXPERT_WEIGHTS_NORM, BOOL, "norm_topk_prob"),
)
"""Of experts that a sigmoid chooses, after some layers without."""

_ERNIE = (
    _EXPERT_WIDTH,
    Field(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, UINT, "moe_layer_start_index"),
    Field(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP, UINT, "moe_layer_interval"),
    Field(Keys.LLM.EXPERT_SHARED_COUNT, UINT, "moe_num_shared_experts"),
    Field(
        Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH,
        UINT,
        lambda config: config.moe_num_shared_experts * config.moe_intermediate_size,
    ),
)


def _normed(epsilon: str | Callable[[Any], float]) -> tuple[Field, ...]:
    """Of a decoder with layer norms."""
    return (*_SIZES, Field(Keys.Attention.LAYERNORM_EPS, FLOAT, epsilon))


def _experts(count: str, used: str = "num_experts_per_tok") -> tuple[Field, ...]:
    """Of layers with experts: config names of how many there are, and how many see a token."""
    return Field(Keys.LLM.EXPERT_COUNT, UINT, count), Field(Keys.LLM.EXPERT_USED_COUNT, UINT, used)


def _every(period: int) -> Callable[[Any], list[str]]:
    """Of so many layers, the last sees everything, the others slide."""
    kinds = ("full_attention", "sliding_attention")
    return lambda config: [kinds[layer % period > 0] for layer in range(1, config.num_hidden_layers + 1)]


def _without_rotation(period: int) -> Callable[[Any], list[int]]:
    """Of so many layers, the last is not rotated."""
    return lambda config: [int(layer % period > 0) for layer in range(1, config.num_hidden_layers + 1)]


def _all_full(config: Any) -> list[str]:
    return ["full_attention"] * int(config.num_hidden_layers)


_INTERLEAVED = {
    MODEL_TENSOR.ATTN_Q: _halves_to_neighbours("num_attention_heads"),
    MODEL_TENSOR.ATTN_K: _halves_to_neighbours("num_key_value_heads"),
}
_SILU = {"hidden_act": "silu"}
_RELU2 = {"hidden_act": "relu2"}
_UNBIASED = {"attention_bias": False}
_NOT_SLIDING = {"hidden_act": "silu", "use_sliding_window": False}
_NEVER_SLIDING = {"hidden_act": "silu", "sliding_window": None}
_GELU_TANH = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_SCALED_BY_HEAD = {"query_pre_attn_scalar": head_dim}
_ALL_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_AS_MANY_KEYS = {"num_key_value_heads": lambda config: config.num_attention_heads}
_PLAIN_GPT2 = {"scale_attn_weights": True, "add_cross_attention": False}
_CORRECTION = {"e_score_correction_bias": "e_score_correction.bias"}

_A = Architecture
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _A("llama", _DECODER, _INTERLEAVED, _SILU),
    "mistral": _A("llama", _DECODER, _INTERLEAVED, _NEVER_SLIDING),
    "mixtral": _A("llama", (*_DECODER, *_experts("num_local_experts")), _INTERLEAVED, _NEVER_SLIDING),
    "qwen2": _A("qwen2", _DECODER, fixed=_NOT_SLIDING),
    "qwen2_moe": _A(
        "qwen2moe", (*_DECODER, *_experts("num_experts"), _EXPERT_WIDTH, _SHARED_WIDTH),
        fixed=_NOT_SLIDING | _ALL_EXPERTS | {"norm_topk_prob": False},
    ),
    "qwen3": _A("qwen3", _DECODER, fixed=_NOT_SLIDING),
    "qwen3_moe": _A(
        "qwen3moe", (*_DECODER, *_experts("num_experts"), _EXPERT_WIDTH),
        fixed=_NOT_SLIDING | _ALL_EXPERTS | {"norm_topk_prob": True},
    ),
    "olmo": _A("olmo", (*_normed(lambda config: 1e-5), _CLAMP), _INTERLEAVED, _SILU | _UNBIASED),
    "olmo2": _A("olmo2", _DECODER, fixed=_SILU),
    "olmo3": _A("olmo2", (*_DECODER, _SLIDING), fixed=_SILU | _UNBIASED | {"layer_types": _every(4)}),
    "olmoe": _A(
        "olmoe", (*_DECODER, *_experts("num_experts")),
        fixed=_SILU | _AS_MANY_KEYS | {"norm_topk_prob": False, "clip_qkv": None},
    ),
    "phi": _A("phi2", _normed("layer_norm_eps"), fixed={"hidden_act": "gelu_new", "qk_layernorm": False},
              rotates_partly=True),
    "phi3": _A("phi3", (*_DECODER, _SLIDING, _ORIGINAL_CONTEXT), fixed=_SILU),
    "starcoder2": _A(
        "starcoder2", _normed("norm_epsilon"), fixed={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None}
    ),
    "gpt2": _A(
        "gpt2", _GPT2, is_rotated=False,
        fixed=_PLAIN_GPT2 | {"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_bigcode": _A(
        "starcoder", (*_GPT2, _ONE_KEY), is_rotated=False,
        fixed=_PLAIN_GPT2 | {"activation_function": "gelu_pytorch_tanh", "multi_query": True},
    ),
    "gpt_neox": _A(
        "gptneox", (*_normed("layer_norm_eps"), _IS_PARALLEL), {MODEL_TENSOR.ATTN_QKV: _heads_to_kinds},
        {"hidden_act": "gelu"}, rotates_partly=True,
    ),
    "stablelm": _A(
        "stablelm", (*_normed("layer_norm_eps"), _IS_PARALLEL), fixed=_SILU | {"qk_layernorm": False},
        rotates_partly=True,
    ),
    "nemotron": _A("nemotron", _normed("norm_eps"), fixed=_RELU2, has_offset_gains=True, rotates_partly=True),
    "cohere": _A("command-r", (*_normed("layer_norm_eps"), _LOGIT_SCALE), fixed=_SILU | _UNBIASED | {
        "use_qk_norm": False,
    }),
    "cohere2": _A("cohere2", (*_normed("layer_norm_eps"), _LOGIT_SCALE, _SLIDING), fixed=_SILU | _UNBIASED | {
        "layer_types": _every(4),
    }),
    "gemma": _A("gemma", _DECODER, fixed=_UNBIASED, has_offset_gains=True),
    "gemma2": _A(
        "gemma2", (*_DECODER, _SLIDING, _FINAL_CAP, _ATTENTION_CAP),
        fixed=_GELU_TANH | _SCALED_BY_HEAD | {"layer_types": _every(2)}, has_offset_gains=True,
    ),
    "gemma3_text": _A(
        "gemma3", (*_DECODER, _SLIDING, _FINAL_CAP),
        fixed=_GELU_TANH | _SCALED_BY_HEAD | {"layer_types": _every(6)}, has_offset_gains=True,
    ),
    "granite": _A("granite", (*_DECODER, *_SCALES), _INTERLEAVED, _SILU),
    "granitemoe": _A(
        "granitemoe", (*_DECODER, *_SCALES, *_experts("num_local_experts")), _INTERLEAVED, _SILU,
        renamed={"block_sparse_moe.router.": "block_sparse_moe.router.layer."},
    ),
    "arcee": _A("arcee", _DECODER, _INTERLEAVED, _RELU2 | _UNBIASED),
    "seed_oss": _A("seed_oss", _DECODER, fixed=_SILU | {"attention_out_bias": False, "mlp_bias": False}),
    "smollm3": _A(
        "smollm3", _DECODER, _INTERLEAVED,
        _NOT_SLIDING | _UNBIASED | {"mlp_bias": False, "no_rope_layers": _without_rotation(4)},
    ),
    "exaone4": _A("exaone4", _DECODER, fixed=_NEVER_SLIDING | {"layer_types": _all_full}),
    "glm4": _A("glm4", _DECODER, fixed=_SILU, rotates_partly=True),
    "glm4_moe": _A(
        "glm4moe", (*_DECODER, *_experts("n_routed_experts"), *_ROUTED), fixed=_SILU | _ONE_GROUP,
        rotates_partly=True, renamed=_CORRECTION,
    ),
    "dots1": _A(
        "dots1", (*_DECODER, *_experts("n_routed_experts"), *_ROUTED), renamed=_CORRECTION,
        fixed=_SILU | _UNBIASED | _ONE_GROUP | _AS_MANY_KEYS | {"layer_types": _all_full},
    ),
    "ernie4_5": _A("ernie4_5", _DECODER, fixed=_SILU | {"use_bias": False}),
    "ernie4_5_moe": _A(
        "ernie4_5-moe", (*_DECODER, *_experts("moe_num_experts", "moe_k"), *_ERNIE),
        fixed=_SILU | {"use_bias": False, "moe_layer_interval": 1},
        renamed={"mlp.gate.moe_statics.e_score_correction_bias": "mlp.moe_statics.e_score_correction.bias"},
    ),
    "hunyuan_v1_dense": _A("hunyuan-dense", _DECODER, fixed=_SILU | _UNBIASED),
    "hunyuan_v1_moe": _A(
        "hunyuan-moe", (*_DECODER, *_experts("num_experts", "moe_topk"), _AS_WIDE), fixed=_SILU | _UNBIASED
    ),
    "minimax_m2": _A(
        "minimax-m2", (*_DECODER, *_experts("num_local_experts"), _EXPERT_WIDTH, _BY_SIGMOID), fixed=_SILU,
        renamed={"mlp.e_score_correction_bias": "block_sparse_moe.e_score_correction.bias"},
    ),
}  # fmt: skip
"""Families by the `model_type` of their configuration; of those with one name in llama.cpp, the simpler first."""


def architecture_of(model: nn.Module) -> Architecture:
    """The family of a model.

    Raises: ExportError naming those there are, or the setting that llama.cpp does not compute.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        found = f"a {type(model).__name__}" if kind is None else f'"{kind}"'
        raise ExportError(f"gguf cannot describe {found} yet; model types it can: {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[kind]
    for name, rule in architecture.fixed.items():
        value = rule(config) if callable(rule) else rule
        found = getattr(config, name, value)
        if found != value:
            raise ExportError(
                f'llama.cpp computes "{architecture.name}" with {name}={value!r}, this model has {found!r}'
            )
    return architecture


def metadata(architecture: Architecture, config: Any) -> list[Metadata]:
    """The keys that describe the computation.

    Raises: ExportError for a rotary scaling that llama.cpp does not have.
    """
    rows = [(row.key, row.kind, row.read(config)) for row in architecture.fields]
    rows += rotary_fields(config, architecture.rotates_partly) if architecture.is_rotated else []
    return [Metadata(key.format(arch=architecture.name), kind, value) for key, kind, value in rows if value is not None]


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """Order of rows that turns rotation by halves into rotation by neighbours; row i of the file is row result[i].

    Raises: ExportError if heads do not have an even number of rows each.
    """
    _check_heads(rows, heads, 2)
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _check_heads(rows: int, heads: int, parts: int) -> None:
    if heads < 1 or rows < 1 or rows % (parts * heads):
        raise ExportError(f"{rows} rows of a projection cannot be rotated in {heads} heads of {parts} equal parts each")
