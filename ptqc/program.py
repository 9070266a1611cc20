"""Program: a captured graph as one functional ATen graph, every placeholder known for what it is.

Dynamo's graph speaks torch functions and methods, in-place ones among them. Traced once more with functionalization it
becomes ATen operators without mutation: what reads it needs one small vocabulary, and may run any part of it twice.
Linears appear as `mm` and `addmm` on views, einsum as `bmm`, attention as one fused operator.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ptqc.capture import CapturedGraph, parameter_name

__all__ = ["Program", "behind", "program", "value_of"]


@dataclass(frozen=True)
class Program:
    """A functional ATen graph.

    parameters: placeholder -> parameter; names: placeholder -> its qualified name in the model. inputs: placeholder ->
    the entry of the batch it is. constants: placeholder -> a buffer or number that does not depend on the batch.
    unknown: placeholders that are none of these (values handed over from an earlier graph).
    """

    module: fx.GraphModule
    parameters: Mapping[fx.Node, nn.Parameter]
    names: Mapping[fx.Node, str]
    inputs: Mapping[fx.Node, str]
    constants: Mapping[fx.Node, Any]
    unknown: tuple[fx.Node, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    def arguments(self, batch: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> list[Any]:
        """What to call `module` with. values: other tensors for parameters, by name."""
        given: list[Any] = []
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            if node in self.parameters:
                own = self.parameters[node]
                given.append(own if values is None else values.get(self.names[node], own))
            else:
                given.append(batch[self.inputs[node]] if node in self.inputs else self.constants[node])
        return given


def value_of(node: fx.Node) -> Any:
    """The example value of a node of a dynamo graph or an ATen graph: a fake tensor mostly; None if it has none."""
    return node.meta.get("val", node.meta.get("example_value"))


def program(captured: CapturedGraph, model: nn.Module, batch: Mapping[str, Any]) -> Program:
    """Make a captured graph functional.

    model, batch: what was captured, to recognise parameters, buffers and inputs. Nothing is computed: shapes only.

    Raises: whatever an operator without a fake implementation raises.
    """
    sources = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
    fakes = [value_of(node) for node in sources]
    modes = [fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")]
    trace = make_fx(dispatch_functionalize(_flat(captured.module)), _allow_non_fake_inputs=True)
    with torch.no_grad():
        if modes:
            with modes[0]:
                module = trace(*fakes)
        else:
            module = trace(*captured.values)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    module.graph.eliminate_dead_code()
    return _described(module, placeholders, sources, captured.values, model, batch)


def _flat(module: fx.GraphModule) -> Any:
    """The module as a function that returns its tensors as a tuple."""

    def run(*inputs: Any) -> tuple[Any, ...]:
        found = module(*inputs)
        return tuple(found) if isinstance(found, (list, tuple)) else (found,)

    return run


def _described(
    module: fx.GraphModule,
    placeholders: Sequence[fx.Node],
    sources: Sequence[fx.Node],
    values: Sequence[Any],
    model: nn.Module,
    batch: Mapping[str, Any],
) -> Program:
    named = {id(weight): name for name, weight in model.named_parameters()}
    buffers = {id(value) for value in model.buffers()}
    entries = {id(value): name for name, value in batch.items() if isinstance(value, Tensor)}
    parameters: dict[fx.Node, nn.Parameter] = {}
    names: dict[fx.Node, str] = {}
    inputs: dict[fx.Node, str] = {}
    constants: dict[fx.Node, Any] = {}
    unknown: list[fx.Node] = []
    for node, source, value in zip(placeholders, sources, values, strict=True):
        if isinstance(value, nn.Parameter):
            parameters[node], names[node] = value, named.get(id(value), parameter_name(source))
        elif id(value) in entries:
            inputs[node] = entries[id(value)]
        elif id(value) in buffers or not isinstance(value, Tensor):
            constants[node] = value
        else:
            unknown.append(node)
    return Program(module, parameters, names, inputs, constants, tuple(unknown))


def behind(graph: fx.Graph, sources: Iterable[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """For every node whose value derives from `sources` alone, the sources it derives from."""
    known: dict[fx.Node, frozenset[fx.Node]] = {node: frozenset([node]) for node in sources}
    for node in graph.nodes:
        if node in known or node.op in ("placeholder", "output"):
            continue
        origins = node.all_input_nodes
        if origins and all(origin in known for origin in origins):
            known[node] = frozenset().union(*(known[origin] for origin in origins))
    return known
