"""Which values of a graph are written in place.

Dynamo's graphs are not functional: a method may end in an underscore, `+=` may stay `iadd`, and a value may be a view
of another. Passes that read a value later or earlier than the graph says leave those alone that anything writes.
"""

import torch
from torch import fx

from ptqc.views import function_name

__all__ = ["is_in_place", "written"]

_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"}
)
_SHARING = frozenset(
    {"view", "reshape", "transpose", "permute", "t", "T", "mT", "getitem", "expand", "expand_as", "squeeze",
     "unsqueeze", "flatten", "unflatten", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind",
     "tensor_split", "contiguous", "to", "float", "half", "bfloat16", "double", "type", "type_as", "detach", "alias",
     "view_as", "reshape_as", "movedim", "moveaxis", "swapaxes", "swapdims", "slice", "diagonal", "unfold", "dropout",
     "real", "imag", "view_as_real", "view_as_complex", "as_strided", "ravel", "getattr", "positive", "broadcast_to"}
)  # fmt: skip
"""Functions whose result may share the memory of their first argument."""


def is_in_place(node: fx.Node) -> bool:
    """True if a node writes into one of its arguments, or may."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = function_name(node)
    if name.startswith("__") and name.endswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return name.endswith("_") or name in _OPERATORS or any(map(node.kwargs.get, ("inplace", "out")))


def written(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose memory something in the graph writes, with all that may share it."""
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader.setdefault(node, node) is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    writers = []
    for node in graph.nodes:
        writes = is_in_place(node)
        for source in _shared(node, writes):
            leader[find(node)] = find(source)
        if writes:
            writers.append(node)
    changed = {find(node) for node in writers}
    return frozenset(node for node in list(leader) if find(node) in changed)


def _shared(node: fx.Node, writes: bool) -> list[fx.Node]:
    """Arguments with which a node may share memory."""
    first = node.args[0] if node.args else None
    if writes and not isinstance(first, fx.Node):
        return list(node.all_input_nodes)
    if not writes and (node.op not in ("call_function", "call_method") or function_name(node) not in _SHARING):
        return []
    return [source for source in (first, node.kwargs.get("out")) if isinstance(source, fx.Node)]
