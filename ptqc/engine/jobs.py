"""What the engine is asked to do, and where float weights come from and results go."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptqc.qtensor import QuantTensor
from ptqc.recipe import Rule, fitted_spec
from ptqc.sites import Site
from ptqc.spec import WeightSpec
from ptqc.transforms import Transform

__all__ = ["Job", "Weights", "jobs_of", "transforms_of"]


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


def transforms_of(jobs: Sequence[Job]) -> list[Transform]:
    """Every transform of the rules, each once, in the order in which it is first asked for."""
    return list(dict.fromkeys(transform for job in jobs for transform in job.rule.transforms))
