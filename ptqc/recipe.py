"""Recipes: which transforms, method and spec each weight gets. Patterns over names, first match wins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from ptqc.act_spec import ActSpec
from ptqc.components import Component, chain, describe, entries, name_of
from ptqc.errors import PtqcError
from ptqc.methods import Method, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.recipe_file import KEYS, Row, check_keys, read_rows
from ptqc.select import matches
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings
from ptqc.transforms import Member, Transform, surround

__all__ = [
    "Recipe", "Rule", "fitted_spec", "load_recipe", "make_method", "make_rule", "recipe_of", "recipe_rows",
    "recipe_to_yaml", "remember", "requested_rules", "rule_for", "wants",
]  # fmt: skip


def make_method(method: str | Method, options: Mapping[str, Any] | None = None) -> Method:
    """A method by name with its options set, or the given instance.

    Raises: PtqcError naming the options that exist.
    """
    return chain(method, options).method


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights that match `pattern` are quantized by `method` to `spec`; method None leaves them in float.

    is_exact: the spec was spelled out, so a weight it does not divide is an error rather than a nearby group.
    transforms: what is done to the model first, in order. activation: what is done to the input at run time.
    """

    pattern: str
    method: Method | None
    spec: WeightSpec | None = None
    is_exact: bool = False
    transforms: tuple[Transform, ...] = ()
    activation: ActSpec = field(default_factory=ActSpec)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the input that it takes: of the method, the transforms and static activation scales."""
        needs = set(getattr(self.method, "needs", ())).union(*(transform.needs for transform in self.transforms))
        return frozenset(needs | ({"absmax"} if self.activation.is_static else set()))

    @property
    def is_data_free(self) -> bool:
        """True if a weight alone is enough to go by: no statistics, and no transform of the model around it."""
        return not self.needs and all(transform.is_data_free for transform in self.transforms)

    def surround(self, weight: Tensor, name: str) -> tuple[Surroundings, dict[str, Tensor]]:
        """What a rule that is data-free does at run time around a weight [*lead, out, in], and the tensors for it."""
        member = Member(name, weight, {}, fitted_spec(self, weight.shape), self.activation)
        around, extras = surround(self.transforms, member)
        return replace(around, act=self.activation), extras

    def quantize(self, weight: Tensor, *, name: str, is_transposed: bool = False) -> QuantTensor:
        """A weight [*lead, out, in], or [*lead, in, out] with is_transposed, quantized from its values alone."""
        assert self.method is not None and self.is_data_free
        matrix = weight.mT if is_transposed else weight
        surroundings, extras = self.surround(matrix, name)
        return quantize_weight(
            weight, self.method, fitted_spec(self, matrix.shape), name=name, is_transposed=is_transposed,
            surroundings=surroundings, extras=extras,
        )  # fmt: skip

    @property
    def label(self) -> str:
        """Short name of its components, "smoothquant+gptq"."""
        if self.method is None:
            return "none"
        return "+".join([*map(name_of, self.transforms), name_of(self.method)])


Recipe = Sequence[Rule]


def make_rule(
    pattern: str,
    method: Component | Sequence[Component] | None,
    *,
    transforms: Component | Sequence[Component] = (),
    bits: float | None = None,
    group_size: int | None = None,
    spec: str | WeightSpec | None = None,
    activation: str | ActSpec | None = None,
    options: Mapping[str, Any] | None = None,
) -> Rule:
    """A rule from what a user writes; see `ptqc.components` for methods and transforms.

    transforms: go before those in `method`. group_size: -1 means the whole row. activation: "int8-token", "float" ...;
    None is what the method declares, mostly float.

    Raises: PtqcError if spec and bits or group_size contradict each other, or the method cannot do the spec.
    """
    first = entries(transforms)
    if method is None or method == "none":
        if first and method == "none":
            raise PtqcError("a weight that stays in float has no transforms; drop them, or name a method")
        if not first:
            return Rule(pattern, None)
        method = ()
    made = chain([*first, *entries(method)], options)
    asked = ActSpec.parse(activation) if isinstance(activation, str) else activation or made.activation
    act = getattr(made.method, "activation", ActSpec()) if asked is None else asked
    if spec is None:
        group = made.group if group_size is None else group_size
        return Rule(pattern, made.method, made.method.spec(bits, group), False, made.transforms, act)
    if bits is not None or group_size is not None:
        raise PtqcError("give either spec or bits and group_size, not both")
    exact = WeightSpec.parse(spec) if isinstance(spec, str) else spec
    reason = made.method.refuses(exact)
    if reason is not None:
        raise PtqcError(reason)
    return Rule(pattern, made.method, exact, True, made.transforms, act)


# -------------------------------------------------------------------- recipes


def requested_rules(
    method: Component | Sequence[Component] | None,
    recipe: str | Path | Recipe | Sequence[Mapping[str, Any]] | None,
    request: Mapping[str, Any],
) -> Recipe:
    """The rules of a request: one for every weight, or a recipe. request: the other arguments of `make_rule`.

    Raises: PtqcError for both or neither of them, or a recipe with a request beside it.
    """
    if (method is None) == (recipe is None):
        raise PtqcError("give either a method or a recipe")
    if recipe is None:
        return [make_rule("*", method, **request)]
    given = [name for name, value in request.items() if value is not None]
    if given:
        raise PtqcError(f"a recipe says everything itself; drop {', '.join(given)}")
    return load_recipe(recipe)


def load_recipe(recipe: str | Path | Recipe | Sequence[Mapping[str, Any]]) -> Recipe:
    """A recipe from rules, from mappings with the keys of `make_rule`, or from a YAML or JSON file of such mappings.

    Raises: PtqcError that names the rule, or the line of the file, at fault.
    """
    if isinstance(recipe, (str, Path)):
        rules = [_rule(row) for row in read_rows(Path(recipe))]
    else:
        rules = [row if isinstance(row, Rule) else _rule(_checked(row, n)) for n, row in enumerate(recipe, 1)]
    if not rules:
        raise PtqcError("the recipe has no rules")
    return rules


def _checked(values: object, number: int) -> Row:
    """A row from Python: its values may be objects, so only the keys are checked."""
    source = f"rule {number} of the recipe"
    if not isinstance(values, Mapping):
        raise PtqcError(f"{source} must be a mapping with the keys {', '.join(KEYS)}; got {values!r}")
    check_keys(Row(values, source))
    return Row(values, source)


def _rule(row: Row) -> Rule:
    made = _tried(row.values)
    if isinstance(made, Rule):
        return made
    where = row.where(_culprit(row)) if made.option is None else row.where_option(*made.option)
    raise type(made)(f"{where}: {made}") from None


def _culprit(row: Row) -> str | None:
    """The key of a row without which there would be no error; the method, without which little can be, last."""
    for key in sorted(row.values, key=lambda key: key == "method"):
        if isinstance(_tried({name: value for name, value in row.values.items() if name != key}), Rule):
            return key
    return None


def _tried(values: Mapping[str, Any]) -> Rule | PtqcError:
    """The rule of a row, or the error that it raises."""
    given = {"pattern": "*", "method": None} | dict(values)
    try:
        return make_rule(given.pop("pattern"), given.pop("method"), **given)
    except PtqcError as error:
        return error


def recipe_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """A recipe as mappings of plain values, which `load_recipe` reads and JSON and YAML hold.

    Specs are spelled out where the rule had one; elsewhere bits and groups still give way to what divides a weight.
    """
    return [_row(rule) for rule in recipe]


def _row(rule: Rule) -> dict[str, Any]:
    if rule.method is None:
        return {"pattern": rule.pattern, "method": "none"}
    row: dict[str, Any] = {"pattern": rule.pattern}
    if rule.transforms:
        row["transforms"] = [_short(describe(transform)) for transform in rule.transforms]
    row["method"] = _short(describe(rule.method))
    row |= _storage(rule)
    return row | {"activation": str(rule.activation)}


def _short(described: dict[str, Any]) -> Any:
    return described if len(described) > 1 else described["name"]


def _storage(rule: Rule) -> dict[str, Any]:
    """bits and group_size where they lead to the spec again and may give way, else the spec."""
    assert rule.method is not None and rule.spec is not None
    group = -1 if rule.spec.group is None else rule.spec.group
    bits = 1.58 if rule.spec.codebook == "ternary" else rule.spec.bits
    requests: tuple[dict[str, Any], ...] = ({"bits": bits, "group_size": group}, {"group_size": group}, {})
    fitting = [request for request in requests if not rule.is_exact and _leads_to(rule, request)]
    return fitting[0] if fitting else {"spec": str(rule.spec)}


def _leads_to(rule: Rule, request: Mapping[str, Any]) -> bool:
    assert rule.method is not None
    try:
        return rule.method.spec(request.get("bits"), request.get("group_size")) == rule.spec
    except PtqcError:
        return False


def recipe_to_yaml(recipe: Recipe) -> str:
    """The text of a recipe file that `load_recipe` reads back."""
    return str(yaml.safe_dump(recipe_rows(recipe), sort_keys=False, default_flow_style=None, width=120))


def remember(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> None:
    """Note on a model how it was quantized; copies of it know as well, and it is saved with the model."""
    model._ptqc_recipe = tuple(rows)  # type: ignore[assignment]  # a plain attribute, no parameter


def recipe_of(model: nn.Module) -> tuple[Mapping[str, Any], ...]:
    """The recipe by which a model was quantized, as rows that `load_recipe` reads; () if that is not known."""
    return getattr(model, "_ptqc_recipe", ())


def rule_for(name: str, recipe: Recipe) -> Rule | None:
    """The first rule whose pattern matches the parameter `name`."""
    return next((rule for rule in recipe if matches(name, [rule.pattern])), None)


def wants(name: str, recipe: Recipe) -> bool:
    """Whether a weight of this name is to be quantized."""
    rule = rule_for(name, recipe)
    return rule is not None and rule.method is not None


def fitted_spec(rule: Rule, shape: Sequence[int]) -> WeightSpec:
    """The spec a rule gives a weight of `shape` [..., out, in]: exact if spelled out, else the nearest that divides."""
    assert rule.spec is not None
    return rule.spec if rule.is_exact else rule.spec.fit(shape)
