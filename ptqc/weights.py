"""Weight operands: which parameters of a graph enter linear-like operations, along which axis, and which do not.

A weight operand is a node whose value derives only from parameters, through views, casts, slices, gathers or
arithmetic among parameters. Rules, in this order, for each parameter of two or more dimensions:

1. read by a contraction (linear, matmul, bmm, addmm, einsum, grouped_mm, attention): a weight, unless
2. an embedding reads it, as well or only: kept, or
3. the contraction's result is ranked by topk through softmax, sigmoid or casts (a router): kept, or
4. it is no matrix of at least 16 weights.
5. a value made of it leaves the graph, and no contraction was seen: kept, since a graph break hides its use.
Parameters that do none of this (norms, biases, positions, convolutions) are not reported.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

__all__ = ["WeightUse", "weight_uses"]

# Where the weight operand may stand, and its contracted axis there. Names are those of torch functions and methods.
_CONTRACTIONS: dict[str, dict[int, int]] = {
    "linear": {1: -1},
    "matmul": {0: -1, 1: -2},
    "mm": {0: -1, 1: -2},
    "bmm": {0: -1, 1: -2},
    "mv": {0: -1},
    "__matmul__": {0: -1, 1: -2},
    "__rmatmul__": {0: -2, 1: -1},
    "addmm": {1: -1, 2: -2},
    "baddbmm": {1: -1, 2: -2},
    "grouped_mm": {1: -2},
    "_grouped_mm": {1: -2},
    "grouped_mm_fallback": {1: -2},
    "multi_head_attention_forward": {5: -1, 11: -1},
    "_native_multi_head_attention": {5: -1, 7: -1},
}
_RANKING = frozenset({"topk", "sort", "argsort"})
_TO_RANKING = frozenset(
    {"softmax", "sigmoid", "to", "float", "type_as", "view", "reshape", "add", "__add__", "iadd", "sqrt", "softplus",
     "log_softmax", "relu", "squeeze", "unsqueeze", "contiguous", "flatten", "type", "getitem"}
)  # fmt: skip


@dataclass
class WeightUse:
    """How one parameter is used in a graph.

    input_axis: the axis of the parameter that is contracted, negative, or None if it cannot be told.
    reason: None for a weight to quantize, else why it is kept.
    """

    placeholder: fx.Node
    parameter: Tensor
    contractions: list[fx.Node] = field(default_factory=list)
    escapes: bool = False
    input_axis: int | None = None
    reason: str | None = None


def function_name(node: fx.Node) -> str:
    """Name of the function or method a node calls, without namespace or overload ("linear", "topk")."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0]


def weight_uses(graph: fx.Graph, parameters: Mapping[fx.Node, Tensor]) -> list[WeightUse]:
    """Every parameter of two or more dimensions that the rules above speak of, with the verdict."""
    uses = {node: WeightUse(node, value) for node, value in parameters.items() if value.ndim >= 2}
    behind: dict[fx.Node, frozenset[fx.Node]] = {node: frozenset([node]) for node in parameters}
    for node in graph.nodes:
        if node.op == "output":
            for value in node.all_input_nodes:
                for source in behind.get(value, frozenset()) & uses.keys():
                    uses[source].escapes = True
        if node in behind or node.op in ("placeholder", "output"):
            continue
        operands = _contracted_operands(node, behind)
        for operand, axis in operands:
            for source in behind[operand] & uses.keys():
                _note(uses[source], node, operand, axis)
        sources = _gathered(node) or node.all_input_nodes
        if not operands and sources and all(source in behind for source in sources):
            behind[node] = frozenset().union(*(behind[source] for source in sources))
    for use in uses.values():
        use.reason = _reason_to_keep(use)
    return [use for use in uses.values() if use.contractions or use.reason]


def _gathered(node: fx.Node) -> list[fx.Node]:
    """What a gather reads: rows of a weight stay weights, whatever chose them."""
    if function_name(node) in ("getitem", "index_select", "__getitem__") and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return []


def _contracted_operands(node: fx.Node, behind: Mapping[fx.Node, Any]) -> list[tuple[fx.Node, int | None]]:
    name = function_name(node)
    if name == "einsum":
        return _einsum_operands(node, behind)
    positions = _CONTRACTIONS.get(name, {})
    named = {1: node.kwargs.get("weight", node.kwargs.get("mat2", node.kwargs.get("other")))}
    found: list[tuple[fx.Node, int | None]] = []
    for position, axis in positions.items():
        operand = node.args[position] if position < len(node.args) else named.get(position)
        if isinstance(operand, fx.Node) and operand in behind:
            found.append((operand, axis))
    others = [n for n in node.all_input_nodes if n not in behind]
    return found if others else []  # a product of parameters alone is itself a weight operand, not a use


def _einsum_operands(node: fx.Node, behind: Mapping[fx.Node, Any]) -> list[tuple[fx.Node, int | None]]:
    equation = node.args[0]
    if not isinstance(equation, str):
        return []
    operands = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    left, _, right = equation.replace(" ", "").partition("->")
    found: list[tuple[fx.Node, int | None]] = []
    for operand, letters in zip(operands, left.split(","), strict=False):
        if isinstance(operand, fx.Node) and operand in behind:
            summed = [i - len(letters) for i, letter in enumerate(letters) if right and letter not in right]
            found.append((operand, summed[0] if len(summed) == 1 else None))
    return found if len(found) < len(list(operands)) else []


def _note(use: WeightUse, node: fx.Node, operand: fx.Node, axis: int | None) -> None:
    use.contractions.append(node)
    traced = None if axis is None else _axis_of_parameter(use, operand, axis)
    if use.input_axis is None:
        use.input_axis = traced


def _axis_of_parameter(use: WeightUse, operand: fx.Node, axis: int) -> int | None:
    """Follow an axis of a view back to the parameter: views of one storage share strides."""
    if operand is use.placeholder:
        return axis
    view, base = operand.meta.get("example_value"), use.placeholder.meta.get("example_value")
    if not (isinstance(view, Tensor) and isinstance(base, Tensor)) or view.ndim < -axis:
        return None
    for candidate in (-1, -2):
        if view.stride(axis) == base.stride(candidate) and view.shape[axis] == base.shape[candidate]:
            return candidate
    return None


def _reason_to_keep(use: WeightUse) -> str | None:
    if any(function_name(user) in ("embedding", "embedding_bag") for user in use.placeholder.users):
        return "tied to an embedding" if use.contractions else "an embedding"
    if not use.contractions:
        return "a graph break hides how it is used" if use.escapes else None
    shape = tuple(use.parameter.shape)
    if not use.parameter.is_floating_point():
        return f"holds {use.parameter.dtype}"
    if shape[-1] * shape[-2] < 16 or min(shape[-2:]) == 1:
        return f"shape {shape} is no matrix worth packing"
    if any(_is_ranked(node) for node in use.contractions):
        return "a router: its result is ranked by topk"
    return None


def _is_ranked(node: fx.Node, depth: int = 12) -> bool:
    """Whether the result of `node` reaches a ranking through nothing but monotone functions, biases and casts."""
    if depth == 0:
        return False
    followed: Iterable[fx.Node] = node.users
    return any(
        function_name(user) in _RANKING or (function_name(user) in _TO_RANKING and _is_ranked(user, depth - 1))
        for user in followed
    )
