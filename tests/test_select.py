"""Patterns over names."""

import pytest

from ptqc.errors import PtqcError
from ptqc.select import matches, matches_any, patterns_of, unmatched

NAME = "model.layers.10.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "*.q_proj.*", "model.layers.10", "layers.1?", "*", NAME, r"re:layers\.\d+\.self", "self_attn.*"],
)
def test_finds(pattern):
    assert matches(NAME, [pattern])


@pytest.mark.parametrize("pattern", ["k_proj", "layers.1", "proj", "lm_head", "re:^layers"])
def test_does_not_find(pattern):
    assert not matches(NAME, [pattern])


def test_broken_expression():
    with pytest.raises(PtqcError, match="regular expression"):
        matches(NAME, ["re:("])


def test_a_text_is_one_pattern():
    """Not one for each of its letters, of which "*" would name everything."""
    assert patterns_of("*.mlp.*") == ("*.mlp.*",)
    assert patterns_of(pattern for pattern in ("a", "b")) == ("a", "b")
    for wrong in (3, [None], ["lm_head", 3]):
        with pytest.raises(PtqcError, match=r"exclude takes patterns of names, as in .* got (3|None)"):
            patterns_of(wrong, "exclude")


def test_patterns_that_name_nothing_are_found():
    assert unmatched([NAME, "lm_head.weight"], ["q_proj", "lm_haed", "lm_head"]) == ["lm_haed"]
    assert matches_any(["lm_head.weight", "embed.weight"], ["embed"])
