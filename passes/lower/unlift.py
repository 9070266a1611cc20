"""Copy dynamo's graph with its parameters as attributes.

Dynamo lifts parameters to placeholders and reads the placeholders of its own graph again after the backend returns, so
that graph must not be changed. `gm.meta` is kept (without `dynamo_compile_id` Inductor would treat the weights as
inputs that CUDA graphs must copy); `_param_name_to_source` is not, since attributes may then be added freely. Buffers
and caches stay inputs: a program may replace them between calls. Those that dynamo knows to stay at their address (a
static KV cache) are told to Inductor once the graph is done (`tell_static_inputs`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch._dynamo.source import ConstantSource

from ptqc.capture import parameter_name

__all__ = ["Unlifted", "tell_static_inputs", "unlift"]


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
            # A module with weak references to its quantized parameters, as a grapharg is, cannot be moved any more.
            new.meta = {key: value for key, value in node.meta.items() if key != "grapharg"}
            parameters[new], names[new] = value, parameter_name(node)
            positions.append(index)
        else:
            if node.op in ("get_attr", "call_module"):
                top = node.target.split(".")[0]
                setattr(root, top, getattr(module, top))
            if node.op == "placeholder":
                kept.append(index)
            new = graph.node_copy(node, copied.__getitem__)
        if node.op == "placeholder" and hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source
        copied[node] = new
    unlifted = fx.GraphModule(root, graph)
    unlifted.meta = dict(module.meta)
    return Unlifted(unlifted, parameters, names, positions, kept)


def tell_static_inputs(module: fx.GraphModule) -> None:
    """Let Inductor know which inputs keep their address, so that CUDA graphs need not copy them on every call.

    AOTAutograd reads this from the placeholders of a graph whose attributes all have a source; weights keep theirs,
    what lowering has made gets one. A graph without such inputs, or not from dynamo, is left as it is: its attributes
    are static anyway.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    is_static = ["_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {}) for node in inputs]
    if not any(is_static) or not all(hasattr(node, "_dynamo_source") for node in inputs):
        return
    sources = {
        str(node.target): node._dynamo_source
        for node in module.graph.nodes
        if node.op == "get_attr" and hasattr(node, "_dynamo_source")
    }
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    told: Any = {name: sources.get(name, ConstantSource(f"ptqc_{name}")) for name in names}
    module._param_name_to_source = told
