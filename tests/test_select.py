"""Patterns over names."""

import pytest

from ptqc.errors import PtqcError
from ptqc.select import matches

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
