"""Scale groups of a model, found and proved on its graphs (see `ptqc.groups`).

Every producer is scaled on paper and followed (`ptqc.passes.groups.propagate`). What is left of its channels, and the
weights that have to scale against them, is a fold: exact, since every use of every parameter that changes was seen.
Weights that no fold reaches keep their scale as a multiply at run time, or are refused, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqc.groups import ScaledParameter, ScaleGroup
from ptqc.passes.groups.operands import Key, facts
from ptqc.passes.groups.producers import Producer, producers, uses
from ptqc.passes.groups.propagate import propagated
from ptqc.passes.groups.readers import Parameter, Place, described, parameters_of, places_of
from ptqc.passes.groups.trace import Channels, Seed
from ptqc.passes.groups.unfolded import Reasons, left_over
from ptqc.program import Program

__all__ = ["find_groups"]


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
    parameters = parameters_of(graphs)
    read = {use.operand.key for graph in graphs for use in uses(graph)}
    tried = [(producer, propagated(graphs, producer.seed)) for producer in producers(graphs)]
    folds = _chosen([fold for producer, channels in tried if (fold := _fold(producer, channels, read)) is not None])
    places = places_of(graphs)
    groups = [(places[_first(fold, places)][0], _group(fold, parameters, places)) for fold in folds]
    taken = {seed.key for fold in folds for seed in fold.consumers}
    groups += left_over(graphs, parameters, taken, Reasons(tried))
    return [group for _, group in sorted(groups, key=lambda entry: entry[0])]


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


def _first(fold: _Fold, places: Mapping[Key, Place]) -> Key:
    keys = [seed.key for seed in fold.consumers if seed.key in places]
    return min(keys, key=lambda key: places[key][0])


def _group(fold: _Fold, parameters: Mapping[Key, Parameter], places: Mapping[Key, Place]) -> ScaleGroup:
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
    structure = f"{fold.producer.kind} -> {described([parameters[key] for key in keys])}"
    return ScaleGroup(value, int(fold.live.sum()), "fold", tuple(producer), tuple(consumers), "", structure)
