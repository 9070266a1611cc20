"""Which rule of a recipe each site gets, and the step that applies it."""

from collections.abc import Sequence

from ptqc.errors import PtqcError
from ptqc.methods import quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Recipe, Rule, fitted_spec, rule_for
from ptqc.sites import Site, Skipped

__all__ = ["assign", "quantize_site"]


def assign(sites: Sequence[Site], recipe: Recipe) -> tuple[list[tuple[Site, Rule]], list[Skipped]]:
    """Every site with its rule, and the sites that no rule wants, with the reason.

    Raises: PtqcError for a method that needs statistics of the inputs.
    """
    work, left = [], []
    for site in sites:
        rule = rule_for(site.name, recipe)
        if rule is None or rule.method is None:
            left.append(Skipped(site.name, "no rule of the recipe matches" if rule is None else "the recipe keeps it"))
        elif rule.method.needs:
            needs = ", ".join(sorted(rule.method.needs))
            raise PtqcError(
                f"{type(rule.method).__name__} needs statistics of the inputs ({needs}), which no pass collects yet"
            )
        else:
            work.append((site, rule))
    return work, left


def quantize_site(site: Site, rule: Rule) -> QuantTensor:
    """The quantized weight of a site; the model is not changed."""
    assert rule.method is not None
    shape = site.weight.mT.shape if site.is_transposed else site.weight.shape
    spec = fitted_spec(rule, shape)
    return quantize_weight(site.weight, rule.method, spec, name=site.name, is_transposed=site.is_transposed)
