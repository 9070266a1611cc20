"""Values without a fold: the weights that read them keep their scale as a multiply at run time, or are refused.

A weight is refused if it is tied to an embedding, has more than two axes, or reads less than one whole axis.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ptqc.groups import ScaledParameter, ScaleGroup
from ptqc.passes.groups.operands import Facts, Key
from ptqc.passes.groups.producers import Producer, Use, uses
from ptqc.passes.groups.readers import Parameter, described, root_of
from ptqc.passes.groups.trace import SCORES, Channels

__all__ = ["Reasons", "left_over"]


class Reasons:
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


def left_over(
    graphs: Sequence[Facts], parameters: Mapping[Key, Parameter], taken: set[Key], reasons: Reasons
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
        values = tuple(dict.fromkeys((at[0], root_of(use.value)) for at, use in found))
        in_features = parameters[key].shape[_in_axis(found[0][1])]
        together.setdefault((values, refusal, in_features), []).append(key)
    groups = []
    for identity, keys in together.items():
        _, refusal, _ = identity  # type: ignore[misc]
        at, use = by_weight[keys[0]][0]
        groups.append((at, _unfolded(use, keys, by_weight, parameters, refusal, reasons)))
    return groups


def _in_axis(use: Use) -> int:
    return -1 if use.in_axis is None else use.in_axis


def _refusal(parameter: Parameter, found: Sequence[Use]) -> str:
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
    parameters: Mapping[Key, Parameter],
    refusal: str,
    reasons: Reasons,
) -> ScaleGroup:
    root = root_of(use.value)
    why = reasons.of(root)
    consumers = []
    for key in keys:
        axis = _in_axis(by_weight[key][0][1])
        consumers.append(ScaledParameter(parameters[key].name, axis, torch.arange(parameters[key].shape[axis]), 1.0))
    channels = len(consumers[0].channel)
    structure = f"value -> {described([parameters[key] for key in keys])}"
    if refusal:
        return ScaleGroup(root.name, channels, "refused", (), tuple(consumers), f"{why}; {refusal}", structure)
    return ScaleGroup(root.name, channels, "run-time", (), tuple(consumers), why, structure)
