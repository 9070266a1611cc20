"""Pass insert-observers: watch the inputs of weights, one observer for each value.

1. The other operand of every contraction that reads a weight gets an observer before its first such contraction.
2. Weights that read the same value in the same way share it. Views that only regroup rows are looked through.
3. A matrix takes every row; a stack of experts takes rows by the axis, the index, or the offsets that choose them.
4. The attention of torch, one node in dynamo's graphs, is run so that its output projection is observed inside.
5. Where the input of a weight cannot be told, an observer without a value records the reason.
It does not fire for parameters that no contraction reads. The graph computes what it did before: observers return
nothing. Works on graphs of torch functions (dynamo's) and on functional ATen graphs.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from ptqc.contractions import Contraction
from ptqc.errors import first_line
from ptqc.passes.observe.attention import OUTPUT_WEIGHT, ObservedAttention, is_attention
from ptqc.passes.observe.layout import Layout
from ptqc.passes.observe.recorder import Recorder
from ptqc.pipeline import Context, Pass
from ptqc.views import Axis, function_name, shape_of
from ptqc.weights import WeightUse, weight_uses

__all__ = ["InsertObservers", "Observer"]


class Observer(nn.Module):
    """A node of an observed graph: hands the recorder a value and the parameters that read it."""

    _is_impure = True  # keeps dead code elimination away

    def __init__(self, recorder: Recorder, layout: Layout | None, reason: str = "") -> None:
        super().__init__()
        self.recorder, self.layout, self.reason = recorder, layout, reason

    def forward(self, x: Tensor | None, index: Tensor | int | None, *weights: Tensor) -> None:
        """x: the value, None for an observer that only has a reason."""
        if x is None or self.layout is None:
            self.recorder.note(weights, self.reason)
            return
        try:
            self.recorder.take(x, weights, self.layout, index)
        except (RuntimeError, ValueError) as error:  # an observer never stops the model
            reason = first_line(error)
            self.recorder.note(weights, f"its input of shape {tuple(x.shape)} is not that of the graph: {reason}")


@dataclass(frozen=True)
class _Value:
    """What one observer watches. at: the contraction itself where the value may change before the next."""

    node: fx.Node | None
    layout: Layout | None
    index: fx.Node | int | None = None
    reason: str = ""
    at: fx.Node | None = None


@dataclass
class _Readers:
    """The weights that read a value, and the first contraction that does."""

    first: fx.Node
    weights: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class InsertObservers(Pass):
    """parameters: every parameter by its placeholder. wanted: placeholders to observe, None for all."""

    name: ClassVar[str] = "insert-observers"

    parameters: Mapping[fx.Node, Tensor]
    recorder: Recorder
    wanted: Collection[fx.Node] | None = None

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Insert the observers. Returns how many values are observed."""
        order = {node: place for place, node in enumerate(module.graph.nodes)}
        readers: dict[_Value, _Readers] = {}
        for use in weight_uses(module.graph, self.parameters):
            if self.wanted is None or use.placeholder in self.wanted:
                _collect(use, order, readers)
        attentions = [node for node in module.graph.nodes if is_attention(node)]
        for number, (value, found) in enumerate(readers.items()):
            module.add_submodule(f"observe_{number}", Observer(self.recorder, value.layout, value.reason))
            with module.graph.inserting_before(found.first):
                module.graph.call_module(f"observe_{number}", (value.node, value.index, *found.weights))
        for number, node in enumerate(attentions):
            module.add_submodule(f"attention_{number}", ObservedAttention(self.recorder))
            with module.graph.inserting_before(node):
                inside = module.graph.call_module(f"attention_{number}", node.args, node.kwargs)
            inside.meta = dict(node.meta)
            node.replace_all_uses_with(inside)
            module.graph.erase_node(node)
        return sum(value.layout is not None for value in readers) + len(attentions)


def _collect(use: WeightUse, order: Mapping[fx.Node, int], readers: dict[_Value, _Readers]) -> None:
    for product in use.products:
        if is_attention(product.node) and product.operand is product.node.args[OUTPUT_WEIGHT]:
            continue
        value = _value(use, product)
        found = readers.setdefault(value, _Readers(product.node))
        found.first = min(found.first, product.node, key=order.__getitem__)
        if use.placeholder not in found.weights:
            found.weights.append(use.placeholder)


def _value(use: WeightUse, product: Contraction) -> _Value:
    layout, index = _layout(use, product)
    if isinstance(layout, str) or product.input is None:
        return _Value(None, None, reason=str(layout))
    node = product.input
    if layout == Layout():
        node = _regrouped(node)
    return _Value(node, layout, index, at=product.node if _is_mutated(node) else None)


def _layout(use: WeightUse, product: Contraction) -> tuple[Layout | str, Any]:
    """How the input is read and the index for it; or the reason why that cannot be told."""
    if product.reason is not None or product.axis is None or product.input is None:
        return product.reason or "its contracted axis is not known", None
    ndim = use.parameter.ndim
    view = use.view(product.operand)
    if view is None:
        is_known = ndim == 2 and use.input_axis is not None
        return Layout(product.input_axis) if is_known else "how the operand is made of it cannot be followed", None
    contracted = view.axes[product.axis]
    if contracted.of is None or not contracted.is_whole:
        return "only a part of its inputs, or a mix of its axes, is summed over at a time", None
    if ndim == 2:
        return Layout(product.input_axis), None
    if ndim > 3 or contracted.of == 0:
        return f"of its {ndim} axes, axis {contracted.of} is summed over; stacks are [experts, out, in]", None
    if product.offsets is not None:
        return Layout(product.input_axis, "offsets", use.parameter.shape[0]), product.offsets
    return _stack_layout(use, product, view.axes, dict(view.picked))


def _stack_layout(
    use: WeightUse, product: Contraction, axes: tuple[Axis, ...], picked: Mapping[int, Any]
) -> tuple[Layout | str, Any]:
    experts = use.parameter.shape[0]
    if 0 in picked:
        return Layout(product.input_axis, "given", experts), picked[0]
    partners = dict(product.pairs)
    lead = [(place - len(axes), axis) for place, axis in enumerate(axes) if axis.of == 0]
    if not lead:
        return Layout(product.input_axis, "each", experts, (None,)), None
    if len(lead) == 1 and lead[0][1].is_whole:
        return Layout(product.input_axis, "each", experts, (partners.get(lead[0][0]),)), None
    if any(axis.index is None for _, axis in lead):
        return "only some of its experts are read at a time", None
    index = lead[0][1].index
    places = {axis.slot: place for place, axis in lead}
    slots = tuple(partners.get(places.get(slot, 0)) for slot in range(len(shape_of(index) or ())))
    return Layout(product.input_axis, "given", experts, slots), index


_REGROUPING = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "clone", "alias",
     "detach", "expand"}
)  # fmt: skip


def _regrouped(node: fx.Node) -> fx.Node:
    """The value whose rows, along the last axis, are those of `node`."""
    chain = list(_behind_views(node))
    is_safe = not any(_is_mutated(one) for one in chain)
    return chain[-1] if is_safe else node


def _behind_views(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    while function_name(node) in _REGROUPING and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        before, after = shape_of(source), shape_of(node)
        if not before or not after or before[-1] != after[-1]:
            return
        if function_name(node) == "expand" and before != after:
            return
        node = source
        yield node


def _is_mutated(node: fx.Node) -> bool:
    """Whether something changes the value in place."""
    return any(
        user.args
        and user.args[0] is node
        and (function_name(user) in ("setitem", "iadd", "imul", "isub") or _is_in_place(function_name(user)))
        for user in node.users
    )


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
