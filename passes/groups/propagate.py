"""Propagation: everything that scaling a parameter does to a model, until nothing more has to scale along.

Labels go from the parameters through the graph. Where a contraction needs a weight to scale its columns, or a sum its
bias, that parameter becomes a seed as well, and propagation starts again with it: then every use of every parameter
that changes has been looked at, by the same rules and in all graphs.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ptqc.passes.groups.labels import Scaled, along, compact
from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.operands import Facts
from ptqc.passes.groups.operators import apply
from ptqc.passes.groups.trace import Channels, Result, Seed, Trace

__all__ = ["propagated"]

_ROUNDS = 12  # biases behind biases: a chain longer than this is given up


def propagated(graphs: Sequence[Facts], seed: Seed) -> Channels:
    """Scale one parameter and follow it through all graphs. Channels that must not be scaled are dead in the result.

    seed: its channels are 0 .. n-1, each at least once.
    """
    count = int(seed.channel.max()) + 1
    channels = Channels(torch.zeros(count, dtype=torch.bool), {seed.key: seed})
    for _ in range(_ROUNDS):
        channels.is_extended = False
        for facts in graphs:
            _run(Trace(facts, channels))
            if channels.are_all_dead:
                return channels
        if not channels.is_extended:
            return channels
    channels.is_dead[:] = True
    return channels


def _run(trace: Trace) -> None:
    facts = trace.facts
    waiting: list[tuple[int, fx.Node]] = []
    queued: set[fx.Node] = set()

    def push(node: fx.Node) -> None:
        for user in node.users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(waiting, (facts.order[user], user))

    for seed in list(trace.channels.seeds.values()):
        for node in _entries(trace, seed):
            labels = trace.channels.cleaned(_labels(seed, node, facts))
            trace.values[node] = Scaled(labels, seed.degree)
            queued.add(node)
            push(node)
    while waiting and not trace.channels.are_all_dead:
        _, node = heapq.heappop(waiting)
        if node in trace.values:
            continue
        if node.op == "output":
            trace.kill_inputs(node, "leaves the graph")
            continue
        result = apply(trace, node)
        if _is_scaled(result):
            trace.values[node] = result
            trace.channels.labelled.add(node)
            push(node)


def _is_scaled(result: Result) -> bool:
    if isinstance(result, list):
        return any(part is not None and part.is_scaled for part in result)
    return result is not None and result.is_scaled


def _entries(trace: Trace, seed: Seed) -> list[fx.Node]:
    """Where the scale enters: the placeholders, or the sums with the offset; every other use of those is a leak."""
    facts = trace.facts
    found: list[fx.Node] = []
    for node, operand in facts.operands.items():
        if operand.key != seed.key:
            continue
        before = node.args[0] if node.op == "call_function" else None
        other = facts.operands.get(before) if isinstance(before, fx.Node) else None
        if operand.offset == seed.offset and (other is None or other.offset != seed.offset):
            found.append(node)
        elif operand.offset != seed.offset:
            for user in node.users:
                follows = facts.operands.get(user)
                if (follows is None or follows.key != seed.key) and not operator_name(user).endswith("_like"):
                    trace.kill(seed.channel, user, "its parameter is also read in another way")
    return found


def _labels(seed: Seed, node: fx.Node, facts: Facts) -> Tensor:
    """Labels of the seed at a node: its own axis at a placeholder, looked up through the views before a sum."""
    operand = facts.operands[node]
    if node.op == "placeholder":
        shape = shape_of(node)
        return along(seed.channel, seed.axis, shape)
    index = operand.maps[seed.axis]
    if index is None:
        return torch.full(shape_of(node), -1, dtype=torch.int32)
    return seed.channel[compact(index).long()].expand(shape_of(node))
