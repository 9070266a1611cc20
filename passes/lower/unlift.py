"""Copy dynamo's graph with its parameters as attributes.

Dynamo lifts parameters and buffers to placeholders and reads the placeholders of its own graph again after the backend
returns, so that graph must not be changed. `gm.meta` is kept (without `dynamo_compile_id` Inductor would treat the weights
as inputs that CUDA graphs must copy); `_param_name_to_source` is not, since attributes may then be added freely.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ptqc.capture import is_static, parameter_name

__all__ = ["Unlifted", "unlift"]


@dataclass(frozen=True)
class Unlifted:
    """A graph that holds its weights.

    parameters: the tensor behind each get_attr node; names: its qualified name in the model. kept: indices of the
    placeholders that remain inputs.
    """

    module: fx.GraphModule
    parameters: Mapping[fx.Node, Tensor]
    names: Mapping[fx.Node, str]
    kept: Sequence[int]


def unlift(module: fx.GraphModule, inputs: Sequence[object]) -> Unlifted:
    """Copy `module`; static placeholders become get_attr nodes on a fresh root that shares their tensors."""
    root, graph, copied = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    parameters: dict[fx.Node, Tensor] = {}
    names: dict[fx.Node, str] = {}
    kept: list[int] = []
    values = iter(enumerate(inputs))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            index, value = next(values)
            if isinstance(value, Tensor) and is_static(node, value):
                new = _attribute(root, graph, f"static_{index}", value)
                parameters[new], names[new] = value, parameter_name(node)
                new.meta = dict(node.meta)
            else:
                new = graph.node_copy(node)
                kept.append(index)
        else:
            if node.op in ("get_attr", "call_module"):
                top = node.target.split(".")[0]
                setattr(root, top, getattr(module, top))
            new = graph.node_copy(node, copied.__getitem__)
        copied[node] = new
    unlifted = fx.GraphModule(root, graph)
    unlifted.meta = dict(module.meta)
    return Unlifted(unlifted, parameters, names, kept)


def _attribute(root: nn.Module, graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
    return graph.get_attr(name)


