"""Trace: one propagation of labels through one graph, and what it finds on the way.

An operator that cannot let a scale through does not end the group: it kills the channels that it touches, whose scale
is then 1 and which count as unscaled from there on. What was proved while a channel lived stays true at scale 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.passes.groups.labels import UNSCALED, ZERO, Scaled, compact, disagreeing, largest
from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.operands import Facts, Key, Operand

__all__ = ["RESIDUAL", "SCORES", "Channels", "Death", "Result", "Rule", "Seed", "Trace"]

RESIDUAL = "reaches a sum with a value that is not scaled alike (a residual)"
SCORES = "is contracted with another activation"

Result = Scaled | None | list["Scaled | None"]
"""What a node carries: nothing, labels, or a list of either."""


@dataclass(frozen=True)
class Death:
    """Channels that died at a node, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True, eq=False)
class Seed:
    """A parameter that is scaled: (w + offset) * t[channel] ** degree along an axis, -1 for entries left alone.

    is_consumer: it is a weight that undoes a scale along the axis that it contracts.
    """

    key: Key
    axis: int
    channel: Tensor
    degree: Fraction
    offset: float = 0.0
    is_consumer: bool = False

    def conflicts(self, other: "Seed") -> bool:
        """Whether one parameter cannot be scaled in both ways."""
        mine, theirs = (self.axis, self.degree, self.offset), (other.axis, other.degree, other.offset)
        return mine != theirs


@dataclass(eq=False)
class Channels:
    """The channels of a candidate: which are dead, where they died, and the parameters that must scale along."""

    is_dead: Tensor
    seeds: dict[Key, Seed]
    deaths: list[Death] = field(default_factory=list)
    labelled: set[fx.Node] = field(default_factory=set)
    is_extended: bool = False

    @property
    def are_all_dead(self) -> bool:
        """Whether nothing is left."""
        return bool(self.is_dead.all())

    def kill(self, labels: Tensor, node: fx.Node, reason: str) -> None:
        """Let every channel in `labels` die."""
        hit = compact(labels)
        hit = hit[hit >= 0]
        if not hit.numel():
            return
        self.is_dead[hit.long()] = True
        self.deaths.append(Death(node, reason))

    def cleaned(self, labels: Tensor) -> Tensor:
        """Labels with dead channels unscaled; the same shape, stride-0 axes kept."""
        small = compact(labels)
        dead = (small >= 0) & self.is_dead[small.clamp(min=0).long()]
        if not bool(dead.any()):
            return labels
        return torch.where(dead, UNSCALED, small).expand(labels.shape)

    def demand(self, seed: Seed, node: fx.Node) -> bool:
        """Ask that a parameter scales along. False where it cannot, because it already scales otherwise."""
        known = self.seeds.get(seed.key)
        if known is None:
            self.seeds[seed.key] = seed
            self.is_extended = True
            return True
        if known.conflicts(seed):
            return False
        clash = (known.channel >= 0) & (seed.channel >= 0) & (known.channel != seed.channel)
        if bool(clash.any()):
            self.kill(torch.cat([known.channel[clash], seed.channel[clash]]), node, "a weight would need two scales")
        merged = torch.maximum(known.channel, seed.channel)
        if not torch.equal(merged, known.channel):
            self.seeds[seed.key] = replace(known, channel=merged)
            self.is_extended = True
        return True


@dataclass(eq=False)
class Trace:
    """The labels of one graph."""

    facts: Facts
    channels: Channels
    values: dict[fx.Node, Result] = field(default_factory=dict)

    def of(self, argument: Any) -> Scaled | None:
        """Labels of an operand, dead channels removed; None if it is not scaled (a number, an unscaled value)."""
        if not isinstance(argument, fx.Node):
            return None
        scaled = self.values.get(argument)
        if not isinstance(scaled, Scaled):
            return None
        cleaned = Scaled(self.channels.cleaned(scaled.labels), scaled.degree)
        return cleaned if cleaned.is_scaled else None

    def labels_of(self, argument: Any, scaled: Scaled | None, rank: int) -> Tensor:
        """Compact labels of an operand of an elementwise operator, axes of size 1 put in front up to `rank`."""
        if scaled is not None:
            small = compact(scaled.labels)
        else:
            is_zero = argument in self.facts.zeros if isinstance(argument, fx.Node) else argument == 0
            small = torch.tensor(ZERO if is_zero else UNSCALED, dtype=torch.int32)
        return small.reshape((1,) * (rank - small.ndim) + tuple(small.shape))

    def kill(self, labels: Tensor, node: fx.Node, reason: str) -> None:
        """Let channels die at a node."""
        self.channels.kill(labels, node, reason)

    def kill_inputs(self, node: fx.Node, reason: str) -> None:
        """Let every channel die that enters a node."""
        for source in node.all_input_nodes:
            found = self.values.get(source)
            for scaled in found if isinstance(found, list) else [found]:
                if scaled is not None:
                    self.kill(self.channels.cleaned(scaled.labels), node, reason)

    def takes_scales_only_from(self, node: fx.Node, allowed: Sequence[Any]) -> bool:
        """Whether no input of a node but the allowed ones is scaled; otherwise everything that enters dies."""
        if all(source in allowed or self.values.get(source) is None for source in node.all_input_nodes):
            return True
        self.kill_inputs(node, f"steers {operator_name(node)}")
        return False

    def constant_along(self, labels: Tensor, axes: Sequence[int], node: fx.Node, reason: str) -> Tensor:
        """Labels with axes cut to size 1; channels that vary along one of them die. Other axes keep their size."""
        shape = list(labels.shape)
        small = labels
        for axis in axes:
            small, differing = largest(small, axis)
            self.kill(differing, node, reason)
            shape[axis] = 1
        return self.channels.cleaned(small).expand(shape)

    def agreeing(self, one: Any, other: Any, node: fx.Node, reason: str) -> Scaled | None:
        """The result of an operator that scales only if both operands scale alike (a sum, a maximum, a choice).

        A parameter that does not scale yet is asked to.
        """
        a, b = self.of(one), self.of(other)
        if a is None and b is None:
            return None
        shape = shape_of(node)
        left, right = self.labels_of(one, a, len(shape)), self.labels_of(other, b, len(shape))
        if a is not None and b is not None and a.degree != b.degree:
            reason = "passes through a sum of two powers, which is not positively homogeneous"
            self.kill(left, node, reason)
            self.kill(right, node, reason)
            return None
        degree = a.degree if a is not None else b.degree  # type: ignore[union-attr]
        differs = disagreeing(left, right)
        if bool(differs.any()):
            asked = self._asked_along(one, left, right, degree, node) or self._asked_along(
                other, right, left, degree, node
            )
            if not asked:
                if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
                    reason = "meets a number in a sum or comparison, which is not positively homogeneous"
                for side in (left, right):
                    self.kill(side.expand(differs.shape)[differs], node, reason)
        merged = self.channels.cleaned(torch.maximum(left, right).expand(shape))
        return Scaled(merged, degree)

    def _asked_along(self, argument: Any, own: Tensor, needed: Tensor, degree: Fraction, node: fx.Node) -> bool:
        """Whether a parameter that is added (a bias) can scale like what it is added to."""
        operand = self.facts.operands.get(argument) if isinstance(argument, fx.Node) else None
        differs = disagreeing(own, needed)
        if operand is None or bool((own.expand(differs.shape)[differs] >= 0).any()):
            return False
        return self.ask(operand, torch.maximum(own, needed), degree, node)

    def ask(self, operand: Operand, labels: Tensor, degree: Fraction, node: fx.Node, is_consumer: bool = False) -> bool:
        """Ask the parameter behind an operand to scale so that the operand gets these labels (broadcast over it)."""
        shape = shape_of(operand.node)
        extra = labels.ndim - len(shape)
        wide = [*range(extra), *(extra + at for at, size in enumerate(shape) if size < labels.shape[extra + at])]
        if wide:
            labels = self.constant_along(labels, wide, node, "a parameter is repeated along the scaled axis")
        labels = labels.reshape(labels.shape[extra:])
        found = operand.pulled_back(labels.expand(shape))
        if found is None:
            return False
        axis, channel = found
        if not bool((channel >= 0).any()):
            return True
        return self.channels.demand(Seed(operand.key, axis, channel, degree, operand.offset, is_consumer), node)


Rule = Callable[[Trace, fx.Node], Result]
"""What an operator does to labels."""
