"""Mixes: rules spelled out, and (slow) against the types that llama.cpp itself chooses."""

import pytest
from gguf import MODEL_TENSOR as T

from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_mixes import ALIASES, FALLBACKS, MIXES, Facts, Place, fitting_type, type_in_mix


def types(mix, role, layers=32, **facts):
    """The type in each layer."""
    known = Facts(layers, **facts)
    return [type_in_mix(MIXES[mix], Place(role, layer), known) for layer in range(layers)]


def test_half_of_the_values_and_down_projections_of_q4_k_m_have_more_bits():
    found = types("Q4_K_M", T.FFN_DOWN)
    expected = [n for n in range(32) if n < 4 or n >= 28 or n % 3 == 0]
    assert [n for n, kind in enumerate(found) if kind == "Q6_K"] == expected
    assert set(found) == {"Q4_K", "Q6_K"}
    assert found == types("Q4_K_M", T.ATTN_V)
    assert set(types("Q4_K_M", T.ATTN_Q)) == {"Q4_K"}


@pytest.mark.parametrize(("mix", "role", "facts", "expected"), [
    ("Q3_K_M", T.ATTN_V, {}, ["Q5_K"] * 2 + ["Q4_K"] * 30),
    ("Q3_K_M", T.FFN_DOWN, {}, ["Q5_K"] * 2 + ["Q4_K"] * 30),
    ("Q3_K_L", T.ATTN_OUT, {}, ["Q5_K"] * 32),
    ("Q4_K_S", T.ATTN_V, {}, ["Q5_K"] * 4 + ["Q4_K"] * 28),
    ("Q2_K", T.ATTN_V, {}, ["Q3_K"] * 32),
    ("Q2_K", T.ATTN_V, {"queries_per_key": 4}, ["Q4_K"] * 32),
    ("IQ4_XS", T.FFN_DOWN, {}, ["Q5_K"] * 4 + ["IQ4_XS"] * 28),
    ("IQ4_XS", T.FFN_DOWN, {"has_importance": True}, ["IQ4_XS"] * 32),
    ("Q4_0", T.FFN_DOWN, {"has_importance": True}, ["Q4_1"] * 4 + ["Q4_0"] * 28),
    ("Q4_K_M", T.ATTN_K, {"experts": 8}, ["Q8_0"] * 32),
    ("Q4_K_M", T.ATTN_OUT, {"experts": 8}, ["Q5_K"] * 32),
    ("Q2_K", T.FFN_GATE_INP, {}, ["F32"] * 32),
])  # fmt: skip
def test_rules(mix, role, facts, expected):
    assert types(mix, role, **facts) == expected


def test_what_makes_the_logits_has_six_bits():
    assert types("Q2_K", T.OUTPUT, 1) == ["Q6_K"]
    assert types("Q2_K", T.TOKEN_EMBD, 1) == ["Q2_K"]
    assert types("Q2_K", T.TOKEN_EMBD, 1, is_tied=True) == ["Q6_K"]
    assert types("TQ1_0", T.TOKEN_EMBD, 1) == ["Q4_K"]


def test_one_type_for_all():
    place = Place(T.FFN_DOWN, 0)
    assert type_in_mix(MIXES["Q4_K_M"], place, Facts(1), is_pure=True) == "Q4_K"


def test_rows_that_no_superblock_divides():
    assert [fitting_type(kind, 64) for kind in FALLBACKS] == list(FALLBACKS.values())
    assert {fitting_type(kind, 40) for kind in TYPES if TYPES[kind].weights > 1} == {"F16"}
    assert fitting_type("Q4_K", 512) == "Q4_K"


def test_every_name_in_the_table_is_a_type():
    kinds = {rule.kind for mix in MIXES.values() for rule in mix.rules}
    assert kinds | {mix.base for mix in MIXES.values()} | set(FALLBACKS.values()) <= set(TYPES)
    assert set(ALIASES.values()) <= set(MIXES)
