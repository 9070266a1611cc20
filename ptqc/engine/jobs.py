"""What the engine is asked to do, where float weights come from and results go, and what it says about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ptqc.groups import ScaleGroup
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Rule, fitted_spec
from ptqc.sites import Site
from ptqc.spec import WeightSpec
from ptqc.transforms import Transform

__all__ = ["GroupOutcome", "Job", "Report", "Weights", "jobs_of", "transforms_of"]


@dataclass(frozen=True)
class Job:
    """One weight to quantize by a rule. shape: [*lead, out, in] as stored. dtype: what it will pretend to be."""

    name: str
    rule: Rule
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_transposed: bool = False

    @property
    def spec(self) -> WeightSpec:
        """How it will be stored."""
        return fitted_spec(self.rule, self.shape)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of its input that its method, its transforms and its activation read, and how many rows it saw."""
        return self.rule.needs | {"count"} if self.rule.needs else frozenset()


def jobs_of(work: Iterable[tuple[Site, Rule]]) -> list[Job]:
    """The jobs of sites with their rules."""
    return [Job(site.name, rule, site.stored_shape, site.weight.dtype, site.is_transposed) for site, rule in work]


class Weights(Protocol):
    """Where the engine finds the float parameters of a model and leaves what it makes of them, all by name."""

    def read(self, name: str) -> Tensor:
        """The float values of a parameter as they are now, in the parameter's own shape."""
        ...

    def fold(self, name: str, value: Tensor) -> None:
        """Replace the float values of a parameter."""
        ...

    def store(self, name: str, weight: QuantTensor) -> None:
        """Put the quantized form of a parameter in its place."""
        ...

    def current(self, name: str) -> Tensor:
        """What to run the model with: the quantized form if there is one, else the floats in the model's dtype."""
        ...

    def bias_of(self, name: str) -> str | None:
        """Name of the bias beside a weight, None if it has none."""
        ...


@dataclass(frozen=True)
class GroupOutcome:
    """What a transform did to a scale group. error: relative change of the outputs, checked in wide arithmetic."""

    group: ScaleGroup
    transform: str
    done: str
    """"folded", "run-time", "undone" or "left"."""
    error: float | None = None


@dataclass
class Report:
    """What a run did, for the user: how the model was captured, groups, and everything that fell short."""

    route: str = ""
    groups: list[GroupOutcome] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Weights that stayed in float although a rule wanted them, and why."""
    coverage: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Rows that each expert of a stack has seen, by weight."""
    _said: dict[str, list[str]] = field(default_factory=dict)

    def note(self, text: str, weight: str | None = None) -> None:
        """Say something once, about a weight or in general."""
        names = self._said.setdefault(text, [])
        if weight is not None and weight not in names:
            names.append(weight)

    @property
    def notes(self) -> list[str]:
        """What fell short, a line each; what holds for several weights in one line that names the first."""
        return [_line(text, names) for text, names in self._said.items()]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many groups ended in which way."""
        found: dict[str, int] = {}
        for outcome in self.groups:
            found[outcome.done] = found.get(outcome.done, 0) + 1
        return found


def transforms_of(jobs: Sequence[Job]) -> list[Transform]:
    """Every transform of the rules, each once, in the order in which it is first asked for."""
    return list(dict.fromkeys(transform for job in jobs for transform in job.rule.transforms))


def _line(text: str, names: Sequence[str]) -> str:
    if not names:
        return text
    return f'"{names[0]}": {text}' if len(names) == 1 else f'{len(names)} weights, first "{names[0]}": {text}'
