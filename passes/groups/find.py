"""Scale groups of a model, found and proved on its graphs (see `ptqc.groups`).

Every producer is scaled on paper and followed (`ptqc.passes.groups.propagate`). What is left of its channels, and the
weights that have to scale against them, is a fold: exact, since every use of every parameter that changes was seen.
Weights that no fold reaches keep their scale as a multiply at run time, or are refused, with the reason.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ptqc.groups import ScaledParameter, ScaleGroup
from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.operands import Facts, Key, facts, parameter_key
from ptqc.passes.groups.producers import Producer, Use, producers, uses
from ptqc.passes.groups.propagate import propagated
from ptqc.passes.groups.trace import SCORES, Channels, Seed
from ptqc.program import Program

__all__ = ["find_groups"]


@dataclass(frozen=True, eq=False)
class _Parameter:
    """One parameter over all graphs."""

    name: str
    shape: torch.Size
    is_embedding: bool


@dataclass(frozen=True, eq=False)
class _Fold:
    """A producer and what its propagation left."""

    producer: Producer
    channels: Channels
    live: Tensor

    @property
    def consumers(self) -> list[Seed]:
        return [seed for seed in self.channels.seeds.values() if seed.is_consumer and _covers(seed, self)]


def _covers(seed: Seed, fold: _Fold) -> bool:
    used = seed.channel[seed.channel >= 0]
    return bool(fold.live[used.long()].any())


def find_groups(programs: Sequence[Program]) -> list[ScaleGroup]:
    """Every scale group of the graphs of a model, in the order in which their values are read.

    programs: the graphs of one model on one batch, in the order in which they run. Each weight that a contraction
    reads is a consumer of exactly one group. Parameters are never read; they may be on the meta device.
    """
    graphs = [facts(program) for program in programs]
    parameters = _parameters(graphs)
    read = {use.operand.key for graph in graphs for use in uses(graph)}
    tried = [(producer, propagated(graphs, producer.seed)) for producer in producers(graphs)]
    folds = _chosen([fold for producer, channels in tried if (fold := _fold(producer, channels, read)) is not None])
    places = _places(graphs)
    groups = [(places[_first(fold, places)][0], _group(fold, parameters, places)) for fold in folds]
    taken = {seed.key for fold in folds for seed in fold.consumers}
    groups += _left_over(graphs, parameters, taken, _Reasons(tried))
    return [group for _, group in sorted(groups, key=lambda entry: entry[0])]


def _parameters(graphs: Iterable[Facts]) -> dict[Key, _Parameter]:
    found: dict[Key, _Parameter] = {}
    for graph in graphs:
        for node, name in graph.program.names.items():
            key = parameter_key(graph.program.parameters[node])
            is_looked_up = any(operator_name(user) == "embedding" and user.args[0] is node for user in node.users)
            known = found.get(key)
            found[key] = _Parameter(
                known.name if known else name,
                shape_of(node),
                is_looked_up or (known is not None and known.is_embedding),
            )
    return found


def _fold(producer: Producer, channels: Channels, read: set[Key]) -> _Fold | None:
    """What is left of a producer: live channels that a consumer reads; None if nothing is, or powers differ."""
    if channels.are_all_dead:
        return None
    consumers = [seed for seed in channels.seeds.values() if seed.is_consumer]
    alive = ~channels.is_dead
    reached = torch.zeros_like(alive)
    for seed in consumers:
        reached[seed.channel[seed.channel >= 0].long()] = True
    live = alive & reached
    degrees = {seed.degree for seed in consumers if bool(live[seed.channel[seed.channel >= 0].long()].any())}
    if not bool(live.any()) or len(degrees) != 1:
        return None
    fold = _Fold(producer, channels, live)
    return fold if any(seed.key in read for seed in fold.consumers) else None


def _chosen(folds: Sequence[_Fold]) -> list[_Fold]:
    """Folds such that no weight is the consumer of two: norms before rows, more consumers first, the nearest first."""
    order = sorted(
        folds,
        key=lambda fold: (
            fold.producer.kind != "norm",
            -len(fold.consumers),
            -int(fold.live.sum()),
            (-fold.producer.at[0], -fold.producer.at[1]),
        ),
    )
    chosen: list[_Fold] = []
    taken: set[Key] = set()
    for fold in order:
        keys = {seed.key for seed in fold.consumers}
        if not keys & taken:
            chosen.append(fold)
            taken |= keys
    return chosen


_Place = tuple[tuple[int, int], fx.Node]


def _places(graphs: Sequence[Facts]) -> dict[Key, _Place]:
    """For every parameter that a contraction reads: the position of its first use, and the value read there."""
    found: dict[Key, _Place] = {}
    for which, graph in enumerate(graphs):
        for use in uses(graph):
            root = _root(use.value)
            found.setdefault(use.operand.key, ((which, graph.order[use.contraction.node]), root))
    return found


_TRANSPARENT = frozenset({"view", "_unsafe_view", "reshape", "clone", "alias", "detach", "contiguous", "_to_copy"})


def _root(value: fx.Node) -> fx.Node:
    """The value behind casts and views that leave its last axis alone."""
    while operator_name(value) in _TRANSPARENT:
        source = value.args[0]
        if not isinstance(source, fx.Node) or shape_of(source)[-1:] != shape_of(value)[-1:]:
            return value
        value = source
    return value


def _first(fold: _Fold, places: Mapping[Key, _Place]) -> Key:
    keys = [seed.key for seed in fold.consumers if seed.key in places]
    return min(keys, key=lambda key: places[key][0])


def _group(fold: _Fold, parameters: Mapping[Key, _Parameter], places: Mapping[Key, _Place]) -> ScaleGroup:
    number = torch.where(fold.live, fold.live.cumsum(0) - 1, -1)
    consumers: list[ScaledParameter] = []
    producer: list[ScaledParameter] = []
    degree = fold.consumers[0].degree
    order = sorted(fold.channels.seeds.values(), key=lambda seed: places.get(seed.key, ((-1, 0), None))[0])
    for seed in order:
        channel = torch.where(seed.channel >= 0, number[seed.channel.clamp(min=0).long()], -1)
        if not bool((channel >= 0).any()):
            continue
        power = float(seed.degree / degree)
        entry = ScaledParameter(parameters[seed.key].name, seed.axis, channel, power, seed.offset)
        (consumers if seed.is_consumer else producer).append(entry)
    value = places[_first(fold, places)][1].name
    keys = [seed.key for seed in fold.consumers]
    structure = f"{fold.producer.kind} -> {_described([parameters[key] for key in keys])}"
    return ScaleGroup(value, int(fold.live.sum()), "fold", tuple(producer), tuple(consumers), "", structure)


def _described(consumers: Sequence[_Parameter]) -> str:
    """What reads a value, as in "3 linears, 2 stacks"."""
    kinds = Counter(
        "linear" if len(one.shape) == 2 else "stack" if len(one.shape) == 3 else "other" for one in consumers
    )
    return ", ".join(kind if count == 1 else f"{count} {kind}s" for kind, count in kinds.items())


class _Reasons:
    """Why a value has no fold: the nearest place upstream where a producer's channels died, and why.

    What died in attention scores (queries and keys) is left out: it says nothing of the values.
    """

    def __init__(self, tried: Sequence[tuple[Producer, Channels]]) -> None:
        self.at_death: dict[fx.Node, str] = {}
        self.at_label: dict[fx.Node, str] = {}
        for _, channels in tried:
            reasons = [death for death in channels.deaths if not death.reason.startswith(SCORES)]
            for death in reasons:
                self.at_death.setdefault(death.node, death.reason)
            for node in channels.labelled if reasons else ():
                self.at_label.setdefault(node, reasons[0].reason)

    def of(self, value: fx.Node) -> str:
        """The reason for one value, breadth first towards the inputs."""
        if value.op == "placeholder":
            return "comes from outside the graph"
        waiting, seen = [value], {value}
        while waiting and len(seen) < 64:
            node = waiting.pop(0)
            if node in self.at_label:
                return self.at_label[node]
            if node in self.at_death:
                return self.at_death[node]
            for source in node.all_input_nodes:
                if source not in seen and source.op == "call_function":
                    seen.add(source)
                    waiting.append(source)
        return "no norm or linear produces it"


def _left_over(
    graphs: Sequence[Facts], parameters: Mapping[Key, _Parameter], taken: set[Key], reasons: _Reasons
) -> list[tuple[tuple[int, int], ScaleGroup]]:
    """Groups without a producer: weights that read the same values, scaled at run time or not at all."""
    by_weight: dict[Key, list[tuple[tuple[int, int], Use]]] = {}
    for which, graph in enumerate(graphs):
        for use in uses(graph):
            if use.operand.key not in taken:
                by_weight.setdefault(use.operand.key, []).append(((which, graph.order[use.contraction.node]), use))
    together: dict[object, list[Key]] = {}
    for key, found in by_weight.items():
        refusal = _refusal(parameters[key], [use for _, use in found])
        values = tuple(dict.fromkeys((at[0], _root(use.value)) for at, use in found))
        in_features = 0 if refusal else parameters[key].shape[_in_axis(found[0][1])]
        together.setdefault((values, refusal, in_features), []).append(key)
    groups = []
    for identity, keys in together.items():
        _, refusal, _ = identity  # type: ignore[misc]
        at, use = by_weight[keys[0]][0]
        groups.append((at, _unfolded(use, keys, by_weight, parameters, refusal, reasons)))
    return groups


def _in_axis(use: Use) -> int:
    return -1 if use.in_axis is None else use.in_axis


def _refusal(parameter: _Parameter, found: Sequence[Use]) -> str:
    """Why a weight cannot have its input multiplied at run time; "" if it can."""
    if parameter.is_embedding:
        return "is tied to the embedding"
    if len(parameter.shape) != 2:
        return f"a weight of shape {tuple(parameter.shape)} takes no scale at run time"
    axes = {use.in_axis for use in found}
    if None in axes or len(axes) != 1:
        return "its inputs are not one whole axis of the weight"
    return ""


def _unfolded(
    use: Use,
    keys: Sequence[Key],
    by_weight: Mapping[Key, Sequence[tuple[tuple[int, int], Use]]],
    parameters: Mapping[Key, _Parameter],
    refusal: str,
    reasons: _Reasons,
) -> ScaleGroup:
    root = _root(use.value)
    why = reasons.of(root)
    consumers = []
    for key in keys:
        axis = _in_axis(by_weight[key][0][1])
        consumers.append(ScaledParameter(parameters[key].name, axis, torch.arange(parameters[key].shape[axis]), 1.0))
    channels = len(consumers[0].channel)
    structure = f"value -> {_described([parameters[key] for key in keys])}"
    if refusal:
        return ScaleGroup(root.name, channels, "refused", (), tuple(consumers), f"{why}; {refusal}", structure)
    return ScaleGroup(root.name, channels, "run-time", (), tuple(consumers), why, structure)
