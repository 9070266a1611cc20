"""Which rule of a recipe each site gets, and the step that applies it."""

from collections.abc import Sequence

from ptqc.errors import PtqcError, SpecError
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Recipe, Rule, fitted_spec, rule_for
from ptqc.sites import Site, Skipped

__all__ = ["assign", "needs_data", "nothing_to_do", "quantize_site"]


def assign(
    sites: Sequence[Site], recipe: Recipe, *, has_data: bool = False
) -> tuple[list[tuple[Site, Rule]], list[Skipped]]:
    """Every site with its rule, and the sites that no rule wants or whose weight cannot be stored, with the reason.

    has_data: there is calibration data, so rules may need statistics and transforms.

    Raises: PtqcError for a rule that needs data which is not there, SpecError for a weight that a rule's exact spec
    cannot store.
    """
    work, left = [], []
    for site in sites:
        rule = rule_for(site.name, recipe, site.aliases)
        if rule is None or rule.method is None:
            left.append(Skipped(site.name, "no rule of the recipe matches" if rule is None else "the recipe keeps it"))
        elif not rule.is_data_free and not has_data:
            raise PtqcError(needs_data(rule))
        elif (reason := _unstorable(site, rule)) is None:
            work.append((site, rule))
        elif rule.is_exact:
            raise SpecError(f'cannot store "{site.name}" as {rule.spec}: {reason}')
        else:
            left.append(Skipped(site.name, reason))
    return work, left


def _unstorable(site: Site, rule: Rule) -> str | None:
    """Why the weight of a site cannot be stored as the rule wants, in time to say so before anything is computed."""
    assert rule.method is not None
    spec = fitted_spec(rule, site.stored_shape)
    try:
        spec.groups(site.stored_shape)
    except SpecError as error:
        return str(error)
    return rule.method.refuses(spec)


def needs_data(rule: Rule) -> str:
    """Why a rule does not go without calibration data, and what to do."""
    why = f"statistics of the inputs ({', '.join(sorted(rule.needs))})" if rule.needs else "the graph of the model"
    return f'{rule.label} needs {why}; pass calibration data, as in calibration="docs" with a tokenizer'


def nothing_to_do(skipped: Sequence[Skipped]) -> str:
    """What to tell when no weight would be quantized."""
    reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in skipped[:3])
    return f"nothing would be quantized ({reasons or 'the model has no matrices'})"


def quantize_site(site: Site, rule: Rule) -> QuantTensor:
    """The quantized weight of a site, from the weight alone; the model is not changed."""
    return rule.quantize(site.weight, name=site.name, is_transposed=site.is_transposed)
