"""Recipes: rules in order, from Python and from files, and back."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from ptqc.act_spec import ActSpec
from ptqc.errors import PtqcError, SpecError, UnknownNameError
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.recipe import (
    Rule,
    load_recipe,
    make_method,
    make_rule,
    recipe_of,
    recipe_rows,
    recipe_to_yaml,
    remember,
    rule_for,
)
from ptqc.transforms import TRANSFORMS, Transform


@dataclass(frozen=True)
class Turning(Transform):
    """A transform that reads one statistic."""

    needs: ClassVar[frozenset[str]] = frozenset({"mean_abs"})
    default_options: ClassVar[dict] = {"symmetric": False}
    default_group: ClassVar[int] = 128
    alpha: float = 0.5


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(TRANSFORMS._entries, "turning", Turning)


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


def test_rows_of_a_file_hold_transforms_activations_and_options(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(
        '[{"pattern": "a", "transforms": [{"name": "turning", "alpha": 0.8}], "method": "rtn", "bits": 8,'
        ' "group_size": -1, "activation": "int8-tensor-static", "options": {"symmetric": false}},\n'
        ' {"pattern": "b", "transforms": "turning"},\n {"pattern": "c", "method": "turning+hqq", "spec": "int3g64f"}]'
    )
    first, second, third = load_recipe(file)
    assert first.transforms == (Turning(alpha=0.8),)
    assert (str(first.spec), str(first.activation)) == ("int8z", "int8-tensor-static")
    assert first.needs == {"mean_abs", "absmax"}
    assert (str(second.spec), second.method) == ("int4g128z", RoundToNearest(symmetric=False))
    assert (third.label, third.is_exact) == ("turning+hqq", True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read the recipe .*recipe.yaml: line 1, column 2"),
        ("- {pattern: x}\n- [", "line 2"),
        ("pattern: x", "line 1: a recipe is a list of rules"),
        ("", "line 1: a recipe is a list of rules"),
        ("[]", "no rules"),
        ("- rtn", "line 1: a rule must be a mapping"),
        ("- {pattern: a}\n\n- {method: rtn}", "line 3: the rule has no pattern"),
        ("- pattern: x\n  method: rtn\n  bit: 4", "line 3: a rule has no key 'bit'; known: pattern, .*bits"),
        ("- pattern: x\n  method: rtn\n  bits: four", "line 3: bits must be a number; got 'four'"),
        ("- pattern: x\n  method: rtn\n  bits: true", "line 3: bits must be a number"),
        ("- {pattern: a, method: rtn}\n- {pattern: x, method: rtn, bits: 11}", "line 2: no integer spec"),
        ("- pattern: a\n  method: rtn\n  bits: .nan", "line 3: no integer spec has nan bits"),
        ("- pattern: a\n  method: rtn\n  bits: .inf", "line 3: no integer spec has inf bits"),
        ("- pattern: a\n  method: rtn\n  group_size: 0", "line 3: group must be positive"),
        ("- pattern: a\n  method: rtn\n  spec: int4x", "line 3: 'int4x' is no weight spec"),
        ("- {pattern: a, method: rttn}", "line 1: no method is called 'rttn'"),
        ("- {pattern: a, method: rtn, activation: int9}", "line 1: 'int9' is no activation spec"),
        ("- {pattern: a, method: none, transforms: turning}", "line 1: a weight that stays in float"),
        ("- {pattern: a, method: rtn, options: {x: 1}}", "line 1: method 'rtn' has no option x"),
        ("- {pattern: a, method: {name: gptq, damp: {}}}", "line 1: method 'gptq': damp must be a number; got {}"),
        ("- pattern: a\n  method: gptq\n  options:\n    search: on\n    damp: x", "line 5: .* damp must be a number"),
        ("- pattern: a\n  method: gptq\n  options:\n    search: false\n    damp: -1", "line 5: gptq adds a share"),
        ("- pattern: a\n  method: gptq\n  options:\n    damp: 1\n    dump: 1", "line 5: .* has no option dump"),
        ("- pattern: a\n  method:\n  - name: awq\n    exponents: 2.5\n  - rtn", "line 4: .*exponents must be a whole"),
        ("- pattern: a\n  method:\n  - {name: awq,\n    narrowest: 2}\n  - rtn", "line 4: awq clips"),
        ("- pattern: a\n  transforms: smoothquant\n  method: rtn\n  options:\n    alpha: [1]",
         r"line 5: transform 'smoothquant': alpha must be a number or \"search\"; got \[1\]"),
        ("- {pattern: a, method: hqq, options: {zero: 0}}", 'zero must be "none", "int", "float" or "min"; got 0'),
        ("- {pattern: a, method: rtn, options: {symmetric: 1}}", "symmetric must be true or false; got 1"),
        ("- {pattern: a, method: quip_sharp, options: {multiples: [1, x]}}", "multiples must be a list of numbers"),
        ("[" * 5000, "cannot read the recipe .*recursion"),
        ("- {pattern: a, bits: 1" + "0" * 5000 + "}", "cannot read the recipe .*: Exceeds the limit"),
    ],
)
def test_broken_files_name_the_line(tmp_path, text, says):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(PtqcError, match=says):
        load_recipe(file)


def test_broken_rows_name_the_rule(tmp_path):
    with pytest.raises(PtqcError, match="rule 2 of the recipe: a rule has no key 'bit'"):
        load_recipe([{"pattern": "x"}, {"pattern": "x", "bit": 4}])
    with pytest.raises(PtqcError, match="rule 1 of the recipe must be a mapping"):
        load_recipe(["rtn"])
    with pytest.raises(PtqcError, match="cannot read the recipe"):
        load_recipe(tmp_path / "missing.yaml")


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


def test_activations_come_from_the_user_else_the_method():
    @dataclass(frozen=True)
    class Both(RoundToNearest):
        @property
        def activation(self):
            return ActSpec(dtype="int8")

    assert make_rule("*", "rtn").activation == ActSpec()
    assert str(make_rule("*", Both()).activation) == "int8-token"
    assert make_rule("*", Both(), activation="float").activation == ActSpec()
    assert make_rule("*", "rtn", activation=ActSpec(dtype="fp8e4m3")).activation.dtype == "fp8e4m3"


def test_what_a_rule_needs():
    assert make_rule("*", "rtn").is_data_free
    assert make_rule("*", "rtn", activation="int8-token").is_data_free
    assert not make_rule("*", "rtn", activation="int8-tensor-static").is_data_free
    assert not make_rule("*", "turning").is_data_free
    assert Rule("*", None).needs == frozenset()


def test_a_recipe_survives_its_file(tmp_path):
    rules = [
        make_rule("a", "rtn", bits=8, group_size=-1),
        make_rule("b", ["turning", "hqq"], bits=3, activation="int8-token"),
        make_rule("re:c$", {"name": "hqq", "zero": "int", "norm": 1.0}, spec="int4g32z"),
        make_rule("d", "nf4"),
        make_rule("e", "fp8"),
        make_rule("f", "rtn", bits=1.58),
        make_rule("g", None),
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(rules))
    assert load_recipe(file) == rules
    assert load_recipe(recipe_rows(rules)) == rules
    assert recipe_rows(rules)[1] == {
        "pattern": "b", "transforms": ["turning"], "method": "hqq", "bits": 3, "group_size": 64,
        "activation": "int8-token",
    }  # fmt: skip


def test_a_model_knows_its_recipe():
    model = nn.Linear(8, 8)
    assert recipe_of(model) == ()
    remember(model, recipe_rows([make_rule("*", "rtn")]))
    assert load_recipe(recipe_of(copy.deepcopy(model))) == [make_rule("*", "rtn")]


def test_lists_of_files_become_values(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("- {pattern: a, method: {name: quip_sharp, multiples: [0.9, 1.1]}}\n")
    assert hash(load_recipe(file)[0]) == hash(load_recipe(recipe_rows(load_recipe(file)))[0])
