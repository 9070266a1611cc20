"""Recipes: rules in order, from Python and from files."""

import pytest

from ptqc.errors import PtqcError, SpecError, UnknownNameError
from ptqc.recipe import load_recipe, make_method, make_rule, rule_for


def test_first_match_wins(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "- {pattern: down_proj, method: rtn, bits: 8, group_size: 32}\n"
        "- {pattern: '*.0.*', method: none}\n"
        "- {pattern: '*', method: rtn}\n"
    )
    recipe = load_recipe(file)
    assert str(rule_for("layers.0.mlp.down_proj.weight", recipe).spec) == "int8g32"
    assert rule_for("layers.0.mlp.up_proj.weight", recipe).method is None
    assert str(rule_for("layers.1.mlp.up_proj.weight", recipe).spec) == "int4g64"


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "recipe.yaml"), ("pattern: x", "list of rules"), ("- {method: rtn}", "rule 1"), ("[]", "no rules"),
     ("- {pattern: x, method: rtn, bit: 4}", "rule 1.*bits")],
)  # fmt: skip
def test_broken_files_say_what_is_wrong(tmp_path, text, says):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(PtqcError, match=says):
        load_recipe(file)


def test_rules_check_their_request():
    with pytest.raises(PtqcError, match="not both"):
        make_rule("*", "rtn", bits=4, spec="int4g64")
    with pytest.raises(UnknownNameError):
        make_rule("*", "nothing")
    with pytest.raises(SpecError):
        make_rule("*", "rtn", bits=11)
    with pytest.raises(PtqcError, match="symmetric"):
        make_method("rtn", {"symetric": True})


def test_exact_specs_are_marked():
    assert make_rule("*", "rtn", spec="int4g64z").is_exact
    assert not make_rule("*", "rtn", bits=4, group_size=-1).is_exact
    assert make_rule("*", "rtn", bits=4, group_size=-1).spec.group is None
