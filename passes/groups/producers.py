"""Producers: the parameters from which a scale may start.

1. a gain: a parameter that an activation is multiplied with (w, w + 1, ...), or the weight of a norm;
2. rows: the outputs of a weight that a contraction or a convolution reads.
Everything else that has to scale along (biases, other uses) is found by propagation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import fx

from ptqc.passes.groups.contractions import Contraction, contraction
from ptqc.passes.groups.labels import shrunk
from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.norms import NORMS
from ptqc.passes.groups.operands import Facts, Key, Operand
from ptqc.passes.groups.trace import Seed

__all__ = ["Producer", "Use", "producers", "uses"]


@dataclass(frozen=True, eq=False)
class Producer:
    """Where a scale may start. source: a placeholder of the parameter. at: the position of its first use."""

    kind: Literal["norm", "linear rows"]
    seed: Seed
    source: fx.Node
    at: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Use:
    """A contraction that reads a weight. value: the activation. in_axis: the contracted axis of the parameter,
    negative; None if it is not one whole axis."""

    contraction: Contraction
    value: fx.Node
    operand: Operand
    in_axis: int | None


def uses(facts: Facts) -> Iterator[Use]:
    """Every contraction of an activation with a value that derives from one parameter."""
    for node in facts.order:
        found = contraction(node)
        if found is None:
            continue
        for weight, value, k in ((found.b, found.a, found.k_of_b), (found.a, found.b, found.k_of_a)):
            operand = facts.operands.get(weight)
            if operand is not None and value not in facts.operands:
                yield Use(found, value, operand, _whole_axis(operand, k))


def _whole_axis(operand: Operand, k: int) -> int | None:
    """The axis of the parameter that is contracted, if that is one axis and all of it."""
    axes = operand.axes_along(k)
    if len(axes) != 1 or shape_of(operand.node)[k] != shape_of(operand.source)[axes[0]]:
        return None
    return axes[0]


def producers(graphs: Sequence[Facts]) -> list[Producer]:
    """Every producer, each once, in the order of the graphs."""
    found: dict[tuple[Key, int, float], Producer] = {}
    for which, facts in enumerate(graphs):
        for node, at in facts.order.items():
            for kind, operand, axis in _started(facts, node):
                key = (operand.key, axis, operand.offset)
                if key not in found:
                    size = shape_of(operand.source)[axis]
                    channel = torch.arange(size, dtype=torch.int32)
                    seed = Seed(operand.key, axis, channel, Fraction(1), operand.offset)
                    found[key] = Producer(kind, seed, operand.source, (which, at))
    return list(found.values())


def _started(facts: Facts, node: fx.Node) -> Iterator[tuple[Literal["norm", "linear rows"], Operand, int]]:
    name = operator_name(node)
    if name == "mul":
        operands = [facts.operands.get(arg) for arg in node.args[:2] if isinstance(arg, fx.Node)]
        derived = [operand for operand in operands if operand is not None]
        if len(operands) == 2 and len(derived) == 1:
            for axis in _axes(derived[0]):
                yield "norm", derived[0], axis
    elif name in NORMS:
        weight = node.args[NORMS[name].weight] if len(node.args) > NORMS[name].weight else None
        if isinstance(weight, fx.Node) and weight in facts.operands:
            yield "norm", facts.operands[weight], -1
    elif name == "convolution":
        operand = facts.operands.get(node.args[1])  # type: ignore[arg-type]
        if operand is not None:
            yield "linear rows", operand, -len(operand.maps)
    else:
        yield from _rows(facts, node)


def _axes(operand: Operand) -> list[int]:
    """Axes of a gain along which it is no single number, the last first."""
    shape = shape_of(operand.source)
    rank = len(shape)
    return [at - rank for at in range(rank - 1, -1, -1) if shape[at] > 1 and operand.maps[at] is not None]


def _rows(facts: Facts, node: fx.Node) -> Iterator[tuple[Literal["norm", "linear rows"], Operand, int]]:
    found = contraction(node)
    if found is None:
        return
    for weight, value, k in ((found.b, found.a, found.k_of_b), (found.a, found.b, found.k_of_a)):
        operand = facts.operands.get(weight)
        if operand is None or value in facts.operands or len(shape_of(weight)) < 2:
            continue
        free = -3 - k  # the other one of the last two axes
        for axis in operand.axes_along(free):
            index = operand.maps[axis]
            if index is not None and shrunk(index).shape[k] == 1:
                yield "linear rows", operand, axis
