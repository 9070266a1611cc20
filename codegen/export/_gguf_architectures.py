"""What each family of checkpoints needs in a GGUF file: metadata, tensor names, order of rows.

A family is a row of ARCHITECTURES, found by the `model_type` of the configuration. Tensor names come from the table
of the `gguf` package.

llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates the two halves against each other; for the
families whose kernel does so, rows of the query and key projections are interleaved: [0, d/2, 1, d/2 + 1, ...].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from gguf import MODEL_TENSOR, GGUFValueType, Keys
from torch import Tensor, nn

from ptqc.codegen.export._gguf_rotary import rotary_factors, rotary_fields
from ptqc.errors import ExportError

__all__ = ["ARCHITECTURES", "Architecture", "Metadata", "Placement", "architecture_of", "metadata", "placements"]

UINT, FLOAT = GGUFValueType.UINT32, GGUFValueType.FLOAT32


@dataclass(frozen=True)
class Metadata:
    """A key of the file with its value."""

    key: str
    kind: GGUFValueType
    value: Any


@dataclass(frozen=True)
class Field:
    """A metadata key and where the configuration has its value: a name, or a function of it. None leaves it out.

    sets: the setting that the key gives when a file is read, where it is not the source.
    """

    key: str
    kind: GGUFValueType
    source: str | Callable[[Any], Any]
    sets: str | None = None

    @property
    def attribute(self) -> str | None:
        """The setting that follows from the key."""
        return self.sets or (self.source if isinstance(self.source, str) else None)

    def read(self, config: Any) -> Any:
        """The value, or None."""
        return self.source(config) if callable(self.source) else getattr(config, self.source, None)


Order = Callable[[int, Any], Tensor]
"""(number of rows, configuration) -> order of the rows in the file: row i of it is row result[i] of the model."""


@dataclass(frozen=True)
class Architecture:
    """A family.

    name: what llama.cpp calls it. orders: of the rows of some tensors, from their number and the configuration. fixed:
    config names whose one value (or function of the configuration) llama.cpp computes; an absent one counts as that.
    has_offset_gains: vectors are gains less 1 in the model. rotates_partly: of each head, a part is rotated.
    """

    name: str
    fields: tuple[Field, ...]
    orders: Mapping[MODEL_TENSOR, Order] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    has_offset_gains: bool = False
    rotates_partly: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a weight of the model goes. rows: order of its rows in the file, or None. role: which tensor it is.
    offset: what the file adds to its numbers."""

    name: str
    stored_name: str
    role: MODEL_TENSOR
    weight: Tensor
    rows: Tensor | None = None
    offset: float = 0.0

    @property
    def layer(self) -> int:
        """The layer that the tensor belongs to; 0 for those outside of layers."""
        parts = self.stored_name.split(".")
        return int(parts[1]) if parts[0] == "blk" else 0

    def arranged(self) -> Tensor:
        """The weight as the file has it."""
        weight = self.weight.detach()
        if self.offset:
            weight = weight.float() + self.offset
        return weight if self.rows is None else weight.index_select(0, self.rows.to(weight.device))


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
    return torch.arange(rows).view(heads, 3, rows // heads // 3).transpose(0, 1).reshape(-1)


_SIZES = (
    Field(Keys.LLM.VOCAB_SIZE, UINT, "vocab_size"),
    Field(Keys.LLM.CONTEXT_LENGTH, UINT, "max_position_embeddings"),
    Field(Keys.LLM.EMBEDDING_LENGTH, UINT, "hidden_size"),
    Field(Keys.LLM.BLOCK_COUNT, UINT, "num_hidden_layers"),
    Field(Keys.LLM.FEED_FORWARD_LENGTH, UINT, "intermediate_size"),
    Field(Keys.Attention.HEAD_COUNT, UINT, "num_attention_heads"),
    Field(Keys.Attention.HEAD_COUNT_KV, UINT, "num_key_value_heads"),
    Field(Keys.Attention.KEY_LENGTH, UINT, head_dim, "head_dim"),
    Field(Keys.Attention.VALUE_LENGTH, UINT, head_dim),
    Field(Keys.Rope.DIMENSION_COUNT, UINT, _rotated),
)
_DECODER = (*_SIZES, Field(Keys.Attention.LAYERNORM_RMS_EPS, FLOAT, "rms_norm_eps"))
_SLIDING = Field(Keys.Attention.SLIDING_WINDOW, UINT, "sliding_window")
_FINAL_CAP = Field(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, FLOAT, "final_logit_softcapping")
_PHI3 = (*_DECODER, _SLIDING, Field(Keys.Rope.SCALING_ORIG_CTX_LEN, UINT, "original_max_position_embeddings"))
_NEOX = (
    *_SIZES,
    Field(Keys.Attention.LAYERNORM_EPS, FLOAT, "layer_norm_eps"),
    Field(Keys.LLM.USE_PARALLEL_RESIDUAL, GGUFValueType.BOOL, "use_parallel_residual"),
)
_STARCODER2 = (*_SIZES, Field(Keys.Attention.LAYERNORM_EPS, FLOAT, "norm_epsilon"))
_GEMMA2 = (*_DECODER, _SLIDING, _FINAL_CAP, Field(Keys.LLM.ATTN_LOGIT_SOFTCAPPING, FLOAT, "attn_logit_softcapping"))
_GEMMA3 = (*_DECODER, _SLIDING, _FINAL_CAP)


def _every(period: int) -> Callable[[Any], list[str]]:
    """Of so many layers, the last sees everything, the others slide."""

    def types(config: Any) -> list[str]:
        layers = range(1, config.num_hidden_layers + 1)
        return ["sliding_attention" if layer % period else "full_attention" for layer in layers]

    return types


_INTERLEAVED = {
    MODEL_TENSOR.ATTN_Q: _halves_to_neighbours("num_attention_heads"),
    MODEL_TENSOR.ATTN_K: _halves_to_neighbours("num_key_value_heads"),
}
_SILU = {"hidden_act": "silu"}
_NOT_SLIDING = {"hidden_act": "silu", "use_sliding_window": False}
_GELU_TANH = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_SCALED_BY_HEAD = {"query_pre_attn_scalar": head_dim}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _DECODER, _INTERLEAVED, _SILU),
    "mistral": Architecture("llama", _DECODER, _INTERLEAVED, _SILU | {"sliding_window": None}),
    "qwen2": Architecture("qwen2", _DECODER, fixed=_NOT_SLIDING),
    "qwen3": Architecture("qwen3", _DECODER, fixed=_NOT_SLIDING),
    "olmo2": Architecture("olmo2", _DECODER, fixed=_SILU),
    "phi3": Architecture("phi3", _PHI3, fixed=_SILU),
    "starcoder2": Architecture(
        "starcoder2", _STARCODER2, fixed={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None}
    ),
    "gpt_neox": Architecture(
        "gptneox", _NEOX, {MODEL_TENSOR.ATTN_QKV: _heads_to_kinds}, {"hidden_act": "gelu"}, rotates_partly=True
    ),
    "gemma": Architecture("gemma", _DECODER, fixed={"attention_bias": False}, has_offset_gains=True),
    "gemma2": Architecture(
        "gemma2", _GEMMA2, fixed=_GELU_TANH | _SCALED_BY_HEAD | {"layer_types": _every(2)}, has_offset_gains=True
    ),
    "gemma3_text": Architecture(
        "gemma3", _GEMMA3, fixed=_GELU_TANH | _SCALED_BY_HEAD | {"layer_types": _every(6)}, has_offset_gains=True
    ),
}
"""Families by the `model_type` of their configuration."""


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
    rows += rotary_fields(config, architecture.rotates_partly)
    return [Metadata(key.format(arch=architecture.name), kind, value) for key, kind, value in rows if value is not None]


def placements(architecture: Architecture, model: nn.Module) -> list[Placement]:
    """Every tensor of the file, tied weights once.

    Raises: ExportError naming weights the family does not have.
    """
    config: Any = model.config
    table = gguf.get_tensor_name_map(_model_arch(architecture.name), config.num_hidden_layers)
    placed, unknown = [], []
    for name, weight in [*model.named_parameters(), *_persistent_buffers(model)]:
        found = table.get_type_and_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            unknown.append(name)
            continue
        role, stored_name = found
        order = architecture.orders.get(role)
        rows = None if order is None else order(weight.shape[0], config)
        offset = 1.0 if architecture.has_offset_gains and weight.ndim == 1 else 0.0
        placed.append(Placement(name, stored_name, role, weight, rows, offset))
    if unknown:
        raise ExportError(
            f'"{architecture.name}" in llama.cpp has no place for {", ".join(unknown[:5])} '
            f"({len(unknown)} weights); merge adapters and fold wrappers into the model first"
        )
    factors = rotary_factors(config)
    if factors is not None:
        stored_name = f"{gguf.TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
        placed.append(Placement("rotary scaling", stored_name, MODEL_TENSOR.ROPE_FREQS, factors))
    return placed


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """Order of rows that turns rotation by halves into rotation by neighbours; row i of the file is row result[i].

    Raises: ExportError if heads do not have an even number of rows each.
    """
    if heads < 1 or rows < 1 or rows % (2 * heads):
        raise ExportError(f"{rows} rows of a projection cannot be rotated in {heads} heads; heads take an even share")
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _model_arch(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
