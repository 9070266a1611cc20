"""A graph as text that does not depend on how its nodes happen to be called: for expected-graph tests, and for eyes.

x = input
weight = input
v0 = aten.mm.default(x, weight)
return (v0,)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["graph_text"]


def graph_text(module: fx.GraphModule) -> str:
    """One line for every node: inputs by name, everything else numbered in order."""
    names: dict[fx.Node, str] = {}
    lines, numbered = [], 0
    for node in module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_said(node.args[0], names)}")
        elif node.op == "placeholder":
            names[node] = str(node.target)
            lines.append(f"{names[node]} = input")
        else:
            names[node], numbered = f"v{numbered}", numbered + 1
            lines.append(f"{names[node]} = {_call(node, names)}")
    return "\n".join(lines)


def _call(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if node.op == "get_attr":
        return f"self.{node.target}"
    arguments = [_said(value, names) for value in node.args]
    arguments += [f"{key}={_said(value, names)}" for key, value in node.kwargs.items()]
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    target = f"self.{node.target}" if node.op == "call_module" else _function(node.target)
    return f"{target}({', '.join(arguments)})"


def _function(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else str(getattr(target, "__name__", target))


def _said(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, slice):
        return ":".join("" if part is None else _said(part, names) for part in (value.start, value.stop, value.step))
    if isinstance(value, tuple):
        inside = ", ".join(_said(part, names) for part in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_said(part, names) for part in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_said(part, names)}" for key, part in value.items()) + "}"
    return repr(value)
