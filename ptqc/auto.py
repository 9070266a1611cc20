"""Auto: bits for every weight under a budget for all of them, from measured sensitivity.

Every weight is quantized to every candidate spec; what each costs in predictions is measured (`ptqc.sensitivity`), and
one spec for each weight is chosen so that the sum is least and all of them together fit (`ptqc.knapsack`). That losses
add up, that is that errors of different weights do not interact, is an approximation; the choice under it is exact.
"""

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptqc.act_spec import ActSpec
from ptqc.calibrate import batches
from ptqc.components import Chain, Component, chain
from ptqc.errors import PtqcError
from ptqc.knapsack import choose_one_each
from ptqc.methods import quantize_weight
from ptqc.passes.observe.run import observe
from ptqc.recipe import Recipe, Rule
from ptqc.select import Patterns
from ptqc.sensitivity import Forms, by_fisher, by_kl
from ptqc.sites import Site, find_sites, select_sites
from ptqc.spec import WeightSpec

__all__ = ["auto"]

log = logging.getLogger("ptqc")

OnStep = Callable[[str, float, float], None]
_WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of the candidates where the user names none."""


def auto(
    model: nn.Module,
    calibration: Any,
    *,
    bits: float = 3.5,
    base: Component | Sequence[Component] = "gptq",
    candidates: Sequence[str | float | WeightSpec] | None = None,
    group_size: int | None = None,
    tokenizer: Any = None,
    samples: int = 32,
    window: int = 256,
    seed: int = 0,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    measure: Literal["fisher", "kl"] = "fisher",
    on_step: OnStep = lambda what, done, total: None,
) -> Recipe:
    """A recipe that spends `bits` bits per weight in the mean, scales and zeros included, where they help most.

    model: unchanged. base: the method, or transforms and a method, that will be used; the sensitivity is that of the
    method alone. candidates: specs, or widths for the method's own specs; 2, 3, 4, 5, 6 and 8 bits by default.
    calibration, tokenizer: as for `ptqc.quantize`; samples windows of `window` tokens are looked at. measure: "kl"
    runs the model once for each weight and candidate, "fisher" a few times in all.

    Example: `ptqc.quantize(model, recipe=ptqc.auto(model, texts, bits=3.5, tokenizer=tokenizer), calibration=texts)`.

    Raises: PtqcError if no choice of candidates is small enough.
    """
    made = chain(base)
    drawn = batches(calibration, tokenizer, window=window, limit=samples, seed=seed)
    measured = _in_float32(model)
    sites, _ = select_sites(*find_sites(measured, drawn[0]), measured, include, exclude)
    if not sites:
        raise PtqcError("auto has nothing to choose for: no weight would be quantized; see include and exclude")
    specs = _specs(made, candidates, group_size)
    was_training = measured.training
    measured.eval()
    try:
        options = _options(measured, sites, made, specs, drawn, on_step)
        forms = [option.forms for option in options]
        if measure == "kl":
            costs = by_kl(measured, forms, drawn, lambda done, total: on_step("measuring", done, total))
        else:
            costs = by_fisher(measured, forms, drawn, seed=seed, draws=2,
                              on_step=lambda done, total: on_step("measuring", done, total))  # fmt: skip
    finally:
        measured.train(was_training)
    return _recipe(options, _chosen(options, costs, bits), made)


@dataclass(frozen=True)
class _Options:
    """A site, and the specs it may have with the forms that they give."""

    site: Site
    forms: Forms
    specs: Sequence[WeightSpec]

    @property
    def sizes(self) -> list[int]:
        return [form.nbytes for form in self.forms.stored]


def _in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy in float32 if it is in half precision on a CPU, where that is slow and coarse."""
    halves = (torch.float16, torch.bfloat16)
    if any(weight.device.type == "cpu" and weight.dtype in halves for weight in model.parameters()):
        return copy.deepcopy(model).float()
    return model


def _specs(made: Chain, candidates: Sequence[str | float | WeightSpec] | None, group_size: int | None) -> list[Any]:
    """The candidate specs, those that the method refuses left out unless they were asked for."""
    group = made.group if group_size is None else group_size
    found = []
    for candidate in _WIDTHS if candidates is None else candidates:
        try:
            spec = _spec(candidate, made, group)
            reason = made.method.refuses(spec)
            if reason is not None:
                raise PtqcError(reason)
        except PtqcError:
            if candidates is not None:
                raise
            continue
        found.append(spec)
    if not found:
        raise PtqcError(f"{type(made.method).__name__} has no integer specs to choose from; give candidates")
    return found


def _spec(candidate: str | float | WeightSpec, made: Chain, group: int | None) -> WeightSpec:
    if isinstance(candidate, WeightSpec):
        return candidate
    return WeightSpec.parse(candidate) if isinstance(candidate, str) else made.method.spec(candidate, group)


def _options(
    model: nn.Module,
    sites: Sequence[Site],
    made: Chain,
    specs: Sequence[WeightSpec],
    drawn: Sequence[Mapping[str, Tensor]],
    on_step: OnStep,
) -> list[_Options]:
    """Every site with every candidate."""
    needs = frozenset(made.method.needs)
    recorder = observe(model, drawn, {site.weight: needs for site in sites}) if needs else None
    found = []
    for number, site in enumerate(sites):
        statistics = {} if recorder is None else recorder.statistics(site.weight)
        fitted = list(dict.fromkeys(spec.fit(site.stored_shape) for spec in specs))
        stored = [
            quantize_weight(
                site.weight, made.method, spec, name=site.name, is_transposed=site.is_transposed, statistics=statistics
            )
            for spec in fitted
        ]
        found.append(_Options(site, Forms(site.name, site.weight, stored), fitted))
        on_step("quantizing", number + 1, len(sites))
    return found


# -------------------------------------------------------------------- choosing


def _chosen(options: Sequence[_Options], costs: Sequence[Sequence[float]], bits: float) -> list[int]:
    sizes = [option.sizes for option in options]
    count = sum(option.site.weight.numel() for option in options)
    smallest = 8 * sum(map(min, sizes)) / count
    if smallest > bits:
        raise PtqcError(
            f"{bits:g} bits per weight are too few: the smallest candidates take {smallest:.3f}, scales included; "
            "ask for more bits, or give smaller candidates"
        )
    choice = choose_one_each(costs, sizes, int(bits * count / 8))
    spent = 8 * sum(row[chosen] for row, chosen in zip(sizes, choice, strict=True)) / count
    loss = sum(row[chosen] for row, chosen in zip(costs, choice, strict=True))
    kinds = Counter(str(option.specs[chosen]) for option, chosen in zip(options, choice, strict=True))
    named = ", ".join(f"{number} x {kind}" for kind, number in kinds.most_common())
    log.info("auto: %s; %.3f bits per weight, %.2e nats per token expected", named, spent, loss)
    return choice


def _recipe(options: Sequence[_Options], choice: Sequence[int], made: Chain) -> Recipe:
    act = made.activation if made.activation is not None else getattr(made.method, "activation", ActSpec())
    names = [option.site.name for option in options]
    return [
        Rule(_pattern(option.site.name, names), made.method, option.specs[chosen], True, made.transforms, act)
        for option, chosen in zip(options, choice, strict=True)
    ]


def _pattern(name: str, names: Iterable[str]) -> str:
    """A pattern that matches this name and none of the others."""
    others = (other for other in names if other != name)
    is_plain = not re.search(r"[*?\[]", name) and all(f".{name}." not in f".{other}." for other in others)
    return name if is_plain else f"re:^{re.escape(name)}$"
