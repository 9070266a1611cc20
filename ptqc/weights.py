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

from torch import Tensor, fx

from ptqc.contractions import Contraction, contractions_of
from ptqc.program import value_of
from ptqc.views import View, function_name, view_of

__all__ = ["WeightUse", "function_name", "weight_uses"]

_GATHERS = frozenset({"getitem", "index_select", "__getitem__", "index", "select"})
_RANKING = frozenset({"topk", "sort", "argsort"})
_TO_RANKING = frozenset(
    {"softmax", "sigmoid", "to", "float", "type_as", "view", "reshape", "add", "__add__", "iadd", "sqrt", "softplus",
     "log_softmax", "relu", "squeeze", "unsqueeze", "contiguous", "flatten", "type", "getitem"}
)  # fmt: skip


@dataclass
class WeightUse:
    """How one parameter is used in a graph.

    input_axis: the axis of the parameter that is contracted, negative, or None if it cannot be told.
    reason: None for a weight to quantize, else why it is kept. products: every contraction that reads it, in order:
    a node that reads it twice (as query and key, say) has an entry for each.
    """

    placeholder: fx.Node
    parameter: Tensor
    contractions: list[fx.Node] = field(default_factory=list)
    escapes: bool = False
    input_axis: int | None = None
    reason: str | None = None
    products: list[Contraction] = field(default_factory=list)
    views: dict[fx.Node, View | None] = field(default_factory=dict, repr=False)

    def view(self, node: fx.Node) -> View | None:
        """A node whose value derives from the parameter, as a view of it; None if it is more than that."""
        return view_of(node, self.placeholder, self.views)


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
        operands = contractions_of(node, behind)
        for product in operands:
            for source in behind[product.operand] & uses.keys():
                _note(uses[source], product)
        sources = _gathered(node) or node.all_input_nodes
        if not operands and sources and all(source in behind for source in sources):
            behind[node] = frozenset().union(*(behind[source] for source in sources))
    for use in uses.values():
        use.reason = _reason_to_keep(use)
    return [use for use in uses.values() if use.contractions or use.reason]


def _gathered(node: fx.Node) -> list[fx.Node]:
    """What a gather reads: rows of a weight stay weights, whatever chose them."""
    if function_name(node) in _GATHERS and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return []


def _note(use: WeightUse, product: Contraction) -> None:
    use.contractions.append(product.node)
    use.products.append(product)
    traced = None if product.axis is None else _axis_of_parameter(use, product.operand, product.axis)
    if use.input_axis is None:
        use.input_axis = traced


def _axis_of_parameter(use: WeightUse, operand: fx.Node, axis: int) -> int | None:
    """Follow an axis of a view back to the parameter, where that fails by strides: views of one storage share them."""
    if operand is use.placeholder:
        return axis
    found = use.view(operand)
    origin = None if found is None or not found.axes[axis].is_whole else found.axes[axis].of
    if origin is not None:
        return origin - use.parameter.ndim
    view, base = value_of(operand), value_of(use.placeholder)
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
