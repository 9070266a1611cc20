"""Mixes: which tensor of a GGUF file gets which type. The rules are those of llama.cpp, as rows of a table.

A mix has a type for matrices, and rules for tensors that deserve more (or stand less): by their role, the place of
their layer among all layers, and facts about the model. The first rule that applies decides.

Whatever the rules say, a row that no block of the type divides takes a type with smaller blocks (`FALLBACKS`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from gguf import MODEL_TENSOR, LlamaFileType

from ptqc.codegen.export._gguf_blocks import TYPES

__all__ = ["ALIASES", "FALLBACKS", "MIXES", "Facts", "Mix", "Place", "fitting_type", "type_in_mix"]

_T = MODEL_TENSOR
Layers = Callable[[int, int], bool]
"""(layer, number of layers) -> whether the rule applies."""


@dataclass(frozen=True)
class Facts:
    """About a model. queries_per_key: attention heads that share a key. experts: of a layer, 0 without.
    is_tied: whether the embedding makes the logits. has_importance: of columns."""

    layers: int
    queries_per_key: int = 1
    experts: int = 0
    is_tied: bool = False
    has_importance: bool = False


@dataclass(frozen=True)
class Place:
    """A tensor: its role and its layer."""

    role: MODEL_TENSOR
    layer: int


@dataclass(frozen=True)
class Rule:
    """Tensors of these roles in these layers get type `kind` where the model is such."""

    roles: frozenset[MODEL_TENSOR]
    kind: str
    layers: Layers = lambda layer, count: True
    when: Callable[[Facts], bool] = lambda facts: True

    def applies(self, place: Place, facts: Facts) -> bool:
        """Whether it decides about a tensor."""
        return place.role in self.roles and self.when(facts) and self.layers(place.layer, facts.layers)


@dataclass(frozen=True)
class Mix:
    """base: type of matrices. output: of the tensor that makes the logits. file_type: llama.cpp's number for it."""

    base: str
    output: str
    file_type: LlamaFileType
    rules: tuple[Rule, ...] = ()


# -------------------------------------------------------------------- the words of the table


def _first(number: int) -> Layers:
    """The first so many layers."""
    return lambda layer, count: layer < number


def _first_of(parts: int) -> Layers:
    """The first of so many equal parts of the layers."""
    return lambda layer, count: layer < count // parts


def _spread(layer: int, count: int) -> bool:
    """The first and last eighth, and every third layer between."""
    eighth = count // 8
    return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2


def _shares_keys(facts: Facts) -> bool:
    """Values are small then, and serve many heads."""
    return facts.queries_per_key >= 4


def _is_vast(facts: Facts) -> bool:
    return facts.queries_per_key >= 8 and facts.layers >= 80


def _has_eight_experts(facts: Facts) -> bool:
    return facts.experts == 8


def _has_no_importance(facts: Facts) -> bool:
    return not facts.has_importance


_VALUES = frozenset({_T.ATTN_V, _T.ATTN_QKV, _T.ATTN_KV_B})
_KEYS = frozenset({_T.ATTN_K})
_DOWN = frozenset({_T.FFN_DOWN, _T.FFN_DOWN_EXP, _T.FFN_DOWN_SHEXP})
_OUT = frozenset({_T.ATTN_OUT})
_EMBEDDING = frozenset({_T.TOKEN_EMBD})

_EXPERTS = (Rule(_VALUES | _KEYS, "Q8_0", when=_has_eight_experts),)
"""Attention is a small part of such a model."""
_EXPERTS_OUT = (Rule(_OUT, "Q5_K", when=_has_eight_experts),)
_VAST = (Rule(_VALUES, "Q5_K", when=_is_vast),)


def _mix(base: str, file_type: LlamaFileType, *rules: Rule) -> Mix:
    return Mix(base, "Q6_K", file_type, (*_EXPERTS, *rules))


_F = LlamaFileType
MIXES: dict[str, Mix] = {
    "F32": Mix("F32", "F32", _F.ALL_F32),
    "F16": Mix("F16", "F16", _F.MOSTLY_F16),
    "BF16": Mix("BF16", "BF16", _F.MOSTLY_BF16),
    "Q8_0": Mix("Q8_0", "Q8_0", _F.MOSTLY_Q8_0),
    "Q4_0": _mix(
        "Q4_0", _F.MOSTLY_Q4_0, Rule(_DOWN, "Q4_1", _first_of(8), lambda facts: facts.has_importance)
    ),
    "Q4_1": _mix("Q4_1", _F.MOSTLY_Q4_1),
    "Q5_0": _mix(
        "Q5_0", _F.MOSTLY_Q5_0, Rule(_DOWN, "Q5_1", _first_of(8), lambda facts: facts.has_importance)
    ),
    "Q5_1": _mix("Q5_1", _F.MOSTLY_Q5_1),
    "Q2_K": _mix(
        "Q2_K", _F.MOSTLY_Q2_K, *_VAST,
        Rule(_VALUES, "Q4_K", when=_shares_keys), Rule(_VALUES, "Q3_K"), Rule(_DOWN, "Q3_K"),
        *_EXPERTS_OUT, Rule(_OUT, "Q3_K"),
    ),
    "Q2_K_S": _mix(
        "Q2_K", _F.MOSTLY_Q2_K_S, *_VAST, Rule(_VALUES, "Q4_K", when=_shares_keys), Rule(_DOWN, "Q4_K", _first_of(8))
    ),
    "Q3_K_S": _mix("Q3_K", _F.MOSTLY_Q3_K_S, *_VAST, *_EXPERTS_OUT),
    "Q3_K_M": _mix(
        "Q3_K", _F.MOSTLY_Q3_K_M, *_VAST,
        Rule(_VALUES, "Q5_K", _first(2)), Rule(_VALUES, "Q4_K"),
        Rule(_DOWN, "Q5_K", _first_of(16)), Rule(_DOWN, "Q4_K"),
        *_EXPERTS_OUT, Rule(_OUT, "Q4_K"),
    ),
    "Q3_K_L": _mix("Q3_K", _F.MOSTLY_Q3_K_L, Rule(_VALUES | _DOWN | _OUT, "Q5_K")),
    "Q4_K_S": _mix(
        "Q4_K", _F.MOSTLY_Q4_K_S, *_VAST, Rule(_VALUES, "Q5_K", _first(4)), Rule(_DOWN, "Q5_K", _first_of(8)),
        *_EXPERTS_OUT,
    ),
    "Q4_K_M": _mix("Q4_K", _F.MOSTLY_Q4_K_M, Rule(_VALUES | _DOWN, "Q6_K", _spread), *_VAST, *_EXPERTS_OUT),
    "Q5_K_S": _mix("Q5_K", _F.MOSTLY_Q5_K_S),
    "Q5_K_M": _mix("Q5_K", _F.MOSTLY_Q5_K_M, Rule(_VALUES | _DOWN, "Q6_K", _spread)),
    "Q6_K": _mix("Q6_K", _F.MOSTLY_Q6_K),
    "IQ4_NL": _mix(
        "IQ4_NL", _F.MOSTLY_IQ4_NL, Rule(_VALUES, "Q5_K", when=_shares_keys),
        Rule(_DOWN, "Q5_K", _first_of(8), _has_no_importance), *_EXPERTS_OUT,
    ),
    "IQ4_XS": _mix(
        "IQ4_XS", _F.MOSTLY_IQ4_XS, Rule(_VALUES, "Q5_K", when=_shares_keys),
        Rule(_DOWN, "Q5_K", _first_of(8), _has_no_importance), *_EXPERTS_OUT,
    ),
    "TQ1_0": _mix("TQ1_0", _F.MOSTLY_TQ1_0, Rule(_EMBEDDING, "Q4_K")),
    "TQ2_0": _mix("TQ2_0", _F.MOSTLY_TQ2_0, Rule(_EMBEDDING, "Q4_K")),
}  # fmt: skip
"""What `quant` may be."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Names of a family, and the member that they mean."""

FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}  # fmt: skip
"""What takes the place of a type whose blocks do not divide a row; F16 where there is none."""

_IN_FLOAT = frozenset({_T.FFN_GATE_INP, _T.POS_EMBD, _T.TOKEN_TYPES, _T.SSM_CONV1D})
"""Small tensors on which much depends."""


def type_in_mix(mix: Mix, place: Place, facts: Facts, is_pure: bool = False) -> str:
    """The type that a matrix should have. is_pure: `base` for all that may be quantized."""
    if place.role in _IN_FLOAT:
        return "F32"
    if is_pure:
        return mix.base
    if place.role == _T.OUTPUT or (place.role == _T.TOKEN_EMBD and facts.is_tied):
        return mix.output
    return next((rule.kind for rule in mix.rules if rule.applies(place, facts)), mix.base)


def fitting_type(kind: str, columns: int) -> str:
    """The type itself if its blocks divide a row, else what takes its place."""
    while columns % TYPES[kind].weights:
        kind = FALLBACKS.get(kind, "F16")
    return kind
