"""Readers: the parameters of a model over all graphs, and the values that its weights read."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.operands import Facts, Key, parameter_key
from ptqc.passes.groups.producers import uses

__all__ = ["Parameter", "Place", "described", "parameters_of", "places_of", "root_of"]


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter over all graphs."""

    name: str
    shape: torch.Size
    is_embedding: bool


def parameters_of(graphs: Iterable[Facts]) -> dict[Key, Parameter]:
    """Every parameter that a graph takes."""
    found: dict[Key, Parameter] = {}
    for graph in graphs:
        for node, name in graph.program.names.items():
            key = parameter_key(graph.program.parameters[node])
            is_looked_up = any(operator_name(user) == "embedding" and user.args[0] is node for user in node.users)
            known = found.get(key)
            found[key] = Parameter(
                known.name if known else name,
                shape_of(node),
                is_looked_up or (known is not None and known.is_embedding),
            )
    return found


Place = tuple[tuple[int, int], fx.Node]
"""(which graph, position in it) and the value that is read there."""


def places_of(graphs: Sequence[Facts]) -> dict[Key, Place]:
    """For every parameter that a contraction reads: the position of its first use, and the value read there."""
    found: dict[Key, Place] = {}
    for which, graph in enumerate(graphs):
        for use in uses(graph):
            root = root_of(use.value)
            found.setdefault(use.operand.key, ((which, graph.order[use.contraction.node]), root))
    return found


_TRANSPARENT = frozenset({"view", "_unsafe_view", "reshape", "clone", "alias", "detach", "contiguous", "_to_copy"})


def root_of(value: fx.Node) -> fx.Node:
    """The value behind casts and views that leave its last axis alone."""
    while operator_name(value) in _TRANSPARENT:
        source = value.args[0]
        if not isinstance(source, fx.Node) or shape_of(source)[-1:] != shape_of(value)[-1:]:
            return value
        value = source
    return value


def described(consumers: Sequence[Parameter]) -> str:
    """What reads a value, as in "3 linears, 2 stacks"."""
    kinds = Counter(
        "linear" if len(one.shape) == 2 else "stack" if len(one.shape) == 3 else "other" for one in consumers
    )
    return ", ".join(kind if count == 1 else f"{count} {kind}s" for kind, count in kinds.items())
