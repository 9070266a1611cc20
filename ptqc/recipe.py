"""Recipes: which method and spec each weight gets. Patterns over names, first match wins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ptqc.errors import PtqcError
from ptqc.methods import METHODS, Method
from ptqc.select import matches
from ptqc.spec import WeightSpec

__all__ = ["Recipe", "Rule", "fitted_spec", "load_recipe", "make_method", "make_rule", "rule_for"]

_RULE_KEYS = ("pattern", "method", "bits", "group_size", "spec", "options")


def make_method(method: str | Method, options: Mapping[str, Any] | None = None) -> Method:
    """A method by name with its options set, or the given instance.

    Raises: PtqcError naming the options that exist.
    """
    if not isinstance(method, str):
        if options:
            raise PtqcError(f"{type(method).__name__} is already configured; options {sorted(options)} do not apply")
        return method
    factory = METHODS.get(method)
    known = {field.name for field in fields(factory)}  # type: ignore[arg-type]
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise PtqcError(
            f"method {method!r} has no option {', '.join(unknown)}; known: {', '.join(sorted(known)) or 'none'}"
        )
    return factory(**(options or {}))


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights that match `pattern` are quantized by `method` to `spec`; method None leaves them in float.

    is_exact: the spec was spelled out, so a weight it does not divide is an error rather than a nearby group.
    """

    pattern: str
    method: Method | None
    spec: WeightSpec | None = None
    is_exact: bool = False


Recipe = Sequence[Rule]


def make_rule(
    pattern: str,
    method: str | Method | None,
    *,
    bits: float | None = None,
    group_size: int | None = None,
    spec: str | WeightSpec | None = None,
    options: Mapping[str, Any] | None = None,
) -> Rule:
    """A rule from what a user writes. group_size -1 means the whole row.

    Raises: PtqcError if spec and bits or group_size contradict each other, or the method cannot do the spec.
    """
    if method is None or method == "none":
        return Rule(pattern, None)
    made = make_method(method, options)
    if spec is None:
        return Rule(pattern, made, made.spec(bits, group_size))
    if bits is not None or group_size is not None:
        raise PtqcError("give either spec or bits and group_size, not both")
    exact = WeightSpec.parse(spec) if isinstance(spec, str) else spec
    reason = made.refuses(exact)
    if reason is not None:
        raise PtqcError(reason)
    return Rule(pattern, made, exact, is_exact=True)


def load_recipe(recipe: str | Path | Recipe | Sequence[Mapping[str, Any]]) -> Recipe:
    """A recipe from rules, from mappings with the keys of `make_rule`, or from a YAML or JSON file of such mappings.

    Raises: PtqcError that names the rule at fault.
    """
    if isinstance(recipe, (str, Path)):
        return load_recipe(_read(Path(recipe)))
    rules = []
    for number, row in enumerate(recipe, 1):
        if isinstance(row, Rule):
            rules.append(row)
            continue
        if not isinstance(row, Mapping) or "pattern" not in row or set(row) - set(_RULE_KEYS):
            raise PtqcError(
                f"rule {number} of the recipe must be a mapping with the keys {', '.join(_RULE_KEYS)}; got {row!r}"
            )
        arguments = dict(row)
        rules.append(make_rule(arguments.pop("pattern"), arguments.pop("method", None), **arguments))
    if not rules:
        raise PtqcError("the recipe has no rules")
    return rules


def _read(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PtqcError(f"cannot read the recipe {path}: {error}".splitlines()[0]) from None
    if not isinstance(rows, list):
        raise PtqcError(f"the recipe {path} must be a list of rules, each with a pattern and a method")
    return rows


def rule_for(name: str, recipe: Recipe) -> Rule | None:
    """The first rule whose pattern matches the parameter `name`."""
    return next((rule for rule in recipe if matches(name, [rule.pattern])), None)


def fitted_spec(rule: Rule, shape: Sequence[int]) -> WeightSpec:
    """The spec a rule gives a weight of `shape` [..., out, in]: exact if spelled out, else the nearest that divides."""
    assert rule.spec is not None
    return rule.spec if rule.is_exact else rule.spec.fit(shape)
