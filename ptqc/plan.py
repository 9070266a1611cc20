"""Plan: what quantizing a model would do, found without doing it.

How the model is captured, which weights get which transforms, method and spec, which scale groups can be folded and
why the others cannot, what stays in float and why, and the size, memory and time of it all. Works on the meta device
and on folders, whose weights are not read.
"""

import copy
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqc.act_spec import ActSpec
from ptqc.assign import assign
from ptqc.calibrate import batches, moved
from ptqc.capture import CapturedGraph, capture
from ptqc.components import Component
from ptqc.errors import first_line
from ptqc.estimate import Cost, Shape, estimate_bytes, estimate_seconds, seconds_per_weight
from ptqc.folders.architecture import build_empty
from ptqc.folders.folder import open_folder
from ptqc.groups import ScaleGroup
from ptqc.passes.groups.find import find_groups
from ptqc.planned import NOT_CAPTURED, Plan, PlannedGroup, PlannedWeight
from ptqc.program import program
from ptqc.recipe import Recipe, Rule, fitted_spec, requested_rules
from ptqc.sites import UNUSED, Site, Skipped, find_sites, select_sites
from ptqc.spec import WeightSpec
from ptqc.weights import weight_uses

__all__ = ["plan", "plan_work"]

Work = Sequence[tuple[Site, Rule]]
_TOKENS = (1, 16)
"""Batch and length of the example that a model is captured on where nothing else is known."""


def plan(
    model: nn.Module | str | os.PathLike[str],
    method: Component | Sequence[Component] | None = None,
    *,
    bits: float | None = None,
    group_size: int | None = None,
    spec: str | WeightSpec | None = None,
    activation: str | ActSpec | None = None,
    recipe: str | Path | Recipe | Sequence[Mapping[str, Any]] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    samples: int = 128,
    window: int = 512,
    batch: Mapping[str, Tensor] | None = None,
    with_groups: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> Plan:
    """What `quantize` with the same arguments would do. Nothing is changed, and no weight is read.

    model: a model, which may be on the meta device, or a model folder (or hub repository). calibration: as for
    `quantize`; only one batch of it is looked at. batch: example inputs by name instead; without either the model's own
    dummy inputs serve. samples, window: of the calibration to come, for the estimates. with_groups: look for scale
    groups; without, the model is only captured if the use of a weight is unknown otherwise.

    Raises: PtqcError for a request that cannot be.
    """
    request = {"bits": bits, "group_size": group_size, "spec": spec, "activation": activation}
    rules = requested_rules(method, recipe, request | {"options": options or None})
    is_streamed = not isinstance(model, nn.Module)
    made = model if isinstance(model, nn.Module) else build_empty(open_folder(model), trust_remote_code)
    made = _weightless(made)
    if batch is None and calibration is not None:
        batch = batches(calibration, tokenizer, window=window, limit=1)[0]
    example = _example(made, batch)
    found = find_sites(made, graphs=[])
    is_captured = with_groups or any(entry.reason == UNUSED for entry in found[1])
    graphs, how = _captured(made, example) if is_captured else ([], NOT_CAPTURED)
    found = find_sites(made, graphs=graphs or None) if is_captured else found
    sites, skipped = select_sites(*found, made, include, exclude)
    work, left = assign(sites, rules, has_data=True)
    tokens = samples * window
    return _planned(made, work, [*skipped, *left], _Seen(graphs, how, example or {}), tokens, is_streamed)


def plan_work(model: nn.Module, work: Work, skipped: Sequence[Skipped], tokens: int) -> Plan:
    """The plan of a request that is already resolved, without scale groups. tokens: of calibration, 0 without data."""
    return _planned(model, work, skipped, _Seen((), NOT_CAPTURED, {}), tokens, False)


def _weightless(model: nn.Module) -> nn.Module:
    """A model on the meta device as one that can be traced: its tensors on the CPU, each a zero without storage.

    Any other model is returned as it is.
    """
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return model
    copied = copy.deepcopy(model)
    made: dict[int, Tensor] = {}
    for module in copied.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    held[name] = made.setdefault(id(tensor), _zero_like(tensor))  # type: ignore[assignment]
    return copied


def _zero_like(tensor: Tensor) -> Tensor:
    value = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _example(model: nn.Module, batch: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Inputs on the device of the model: the given ones, its dummy inputs, or a few token ids."""
    if batch is None:
        batch = getattr(model, "dummy_inputs", None)
    if batch is None and getattr(model, "main_input_name", None) == "input_ids":
        batch = {"input_ids": torch.arange(_TOKENS[1])[None]}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return None if batch is None else moved(batch, device)


@dataclass(frozen=True)
class _Seen:
    """What capture saw of a model, and the batch it was captured on."""

    graphs: Sequence[CapturedGraph]
    how: str
    batch: Mapping[str, Any]


def _planned(
    model: nn.Module, work: Work, skipped: Sequence[Skipped], seen: _Seen, tokens: int, is_streamed: bool
) -> Plan:
    groups, notes = _groups(seen.graphs, model, seen.batch)
    weights = tuple(_weight(site, rule) for site, rule in work)
    source_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *_buffers(model)))
    quantized = sum(weight.nbytes for weight in weights)
    output_bytes = source_bytes + quantized - sum(weight.source_bytes for weight in weights)
    cost = _cost(model, work, seen.graphs, tokens)
    return Plan(
        seen.how, weights, tuple(groups), tuple(skipped), source_bytes, output_bytes,
        estimate_bytes(cost, source_bytes, quantized, is_streamed), _seconds(work, cost), tuple(notes),
    )  # fmt: skip


def _buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that a checkpoint holds."""
    named, state = dict(model.named_buffers()), model.state_dict(keep_vars=True)
    return [value for name, value in named.items() if name in state]


def _weight(site: Site, rule: Rule) -> PlannedWeight:
    shape = site.stored_shape
    spec = fitted_spec(rule, shape)
    nbytes = spec.nbytes(shape) + (4 if rule.activation.is_static else 0)
    source = site.weight.numel() * site.weight.element_size()
    return PlannedWeight(site.name, shape, rule.label, str(spec), str(rule.activation), nbytes, source)


# -------------------------------------------------------------------- graphs


def _captured(model: nn.Module, batch: Mapping[str, Any] | None) -> tuple[list[CapturedGraph], str]:
    """The graphs of a model, and in words how it is captured."""
    if batch is None:
        return [], "no graph (no example inputs; give calibration or batch)"
    was_training = model.training
    is_weightless = any(parameter.numel() and 0 in parameter.stride() for parameter in model.parameters())
    try:
        graphs = capture(model.eval(), batch, is_run=False)  # shapes are enough, unless there is more than one graph
        if graphs and graphs[0].stopped_by and not is_weightless:
            graphs = capture(model, batch)
    except Exception as error:  # what dynamo does not understand fails in any way
        return [], f"no graph, module hooks instead ({first_line(error)[:120]})"
    finally:
        model.train(was_training)
    breaks = list(dict.fromkeys(graph.stopped_by for graph in graphs if graph.stopped_by))
    if not breaks and len(graphs) == 1:
        return graphs, "one graph"
    count = "several" if is_weightless else str(len(graphs))
    return graphs, f"{count} graphs (breaks: {'; '.join(breaks) or 'unknown'})"


def _groups(
    graphs: Sequence[CapturedGraph], model: nn.Module, batch: Mapping[str, Any]
) -> tuple[list[PlannedGroup], list[str]]:
    try:
        found = find_groups([program(graph, model, batch) for graph in graphs]) if graphs else []
    except Exception as error:  # an operator without shapes fails in any way
        return [], [f"a graph cannot be analysed ({first_line(error)[:120]}): no scale groups"]
    return [_group(group) for group in found], []


def _group(group: ScaleGroup) -> PlannedGroup:
    producers = tuple(dict.fromkeys(entry.name for entry in group.producer))
    return PlannedGroup(
        group.value, group.structure, group.kind, group.reason, group.channels, producers, group.names
    )  # fmt: skip


# -------------------------------------------------------------------- estimates


def _cost(model: nn.Module, work: Work, graphs: Sequence[CapturedGraph], tokens: int) -> Cost:
    sources = _sources(graphs)
    shapes = []
    for site, _ in work:
        *lead, out_features, in_features = site.stored_shape
        source = sources.get(id(site.weight), site.name)
        shapes.append(Shape(torch.Size(lead).numel(), out_features, in_features, source))
    is_data_free = all(rule.is_data_free for _, rule in work)
    needs = frozenset().union(*(rule.needs for _, rule in work))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(shapes, needs, parameters, 0 if is_data_free else tokens, 2 if len(graphs) == 1 else 1)


def _sources(graphs: Sequence[CapturedGraph]) -> dict[int, str]:
    """What the input value of every weight is called, by the identity of the weight."""
    found = {}
    for number, graph in enumerate(graphs):
        for use in weight_uses(graph.module.graph, graph.parameters):
            inputs = [product.input.name for product in use.products if product.input is not None]
            if inputs:
                found[id(use.parameter)] = f"{number}/{inputs[0]}"
    return found


def _seconds(work: Work, cost: Cost) -> float:
    """Estimated seconds; the speed of a method without data is measured on its commonest spec."""
    free = Counter((rule.method, fitted_spec(rule, site.stored_shape)) for site, rule in work)
    per_weight = 0.0
    for (method, spec), _ in free.most_common(1):
        if method is not None and not method.needs:
            per_weight = seconds_per_weight(method, spec)
    return estimate_seconds(cost, per_weight)
