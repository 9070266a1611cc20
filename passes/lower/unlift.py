"""Copy dynamo's graph with its parameters as attributes.

Dynamo lifts parameters to placeholders and reads the placeholders of its own graph again after the backend returns, so
that graph must not be changed. `gm.meta` is kept (without `dynamo_compile_id` Inductor would treat the weights as
inputs that CUDA graphs must copy); `_param_name_to_source` is not, since attributes may then be added freely. Buffers
and caches stay inputs: a program may replace them between calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from ptqc.capture import parameter_name

__all__ = ["Unlifted", "unlift"]


@dataclass(frozen=True)
class Unlifted:
    """A graph that holds its weights.

    parameters: the parameter behind each get_attr node; names: its name as dynamo gives it. positions: index of each
    parameter among the inputs; kept: indices of the placeholders that remain inputs.
    """

    module: fx.GraphModule
    parameters: Mapping[fx.Node, nn.Parameter]
    names: Mapping[fx.Node, str]
    positions: Sequence[int]
    kept: Sequence[int]


def unlift(module: fx.GraphModule, inputs: Sequence[object]) -> Unlifted:
    """Copy `module`; placeholders of parameters become get_attr nodes on a fresh root that shares the tensors."""
    root, graph, copied = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    parameters: dict[fx.Node, nn.Parameter] = {}
    names: dict[fx.Node, str] = {}
    positions: list[int] = []
    kept: list[int] = []
    values = iter(enumerate(inputs))
    for node in module.graph.nodes:
        index, value = next(values) if node.op == "placeholder" else (-1, None)
        if isinstance(value, nn.Parameter):
            root.register_parameter(f"weight_{index}", value)
            new = graph.get_attr(f"weight_{index}")
            new.meta = dict(node.meta)
            parameters[new], names[new] = value, parameter_name(node)
            positions.append(index)
        else:
            if node.op in ("get_attr", "call_module"):
                top = node.target.split(".")[0]
                setattr(root, top, getattr(module, top))
            if node.op == "placeholder":
                kept.append(index)
            new = graph.node_copy(node, copied.__getitem__)
        copied[node] = new
    unlifted = fx.GraphModule(root, graph)
    unlifted.meta = dict(module.meta)
    return Unlifted(unlifted, parameters, names, positions, kept)
