"""Contractions: which operand of a product derives from parameters, which is the other, and how their axes meet.

Products of two factors (`ptqc.product_forms`), einsum over one letter, and the attention of torch as a whole, in graphs
of torch functions and in ATen graphs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ptqc.product_forms import PRODUCTS, ProductForm
from ptqc.views import function_name, shape_of

__all__ = ["Contraction", "contractions_of"]


@dataclass(frozen=True)
class Contraction:
    """One operand of a product that derives from parameters, and what it meets.

    operand: the weight operand; axis: its contracted axis, negative, None if there is not exactly one. input: the
    other operand; input_axis: its contracted axis. pairs: axes of operand and input (both negative) that run together.
    offsets: where the rows of each expert end, for grouped products. reason: why the input cannot be told, or None.
    """

    node: fx.Node
    operand: fx.Node
    axis: int | None
    input: fx.Node | None = None
    input_axis: int = -1
    pairs: tuple[tuple[int, int], ...] = ()
    offsets: fx.Node | None = None
    reason: str | None = None


# Positions of the projections of an attention, and of what goes into each; () for what is computed inside.
_ATTENTIONS: dict[str, dict[int, tuple[int, ...]]] = {
    "multi_head_attention_forward": {5: (0, 1, 2), 11: ()},
    "_native_multi_head_attention": {5: (0, 1, 2), 7: ()},
}


def contractions_of(node: fx.Node, behind: Mapping[fx.Node, Any]) -> list[Contraction]:
    """The weight operands of a node; none if it is no product, or a product of parameters alone.

    behind: nodes whose values derive from parameters alone.
    """
    name = function_name(node)
    if name == "einsum":
        return _einsum(node, behind)
    if name in _ATTENTIONS:
        return _attention(node, behind)
    form = PRODUCTS.get(name)
    if form is None:
        return []
    a, b = form.argument(node, form.a), form.argument(node, form.b)
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or (a in behind and b in behind):
        return []
    if b in behind and "b" in form.weight_in:
        return [_grouped(node, form, a, b) if form.offsets is not None else _product(node, form, b, a, is_b=True)]
    return [_product(node, form, a, b, is_b=False)] if a in behind and "a" in form.weight_in else []


def _product(node: fx.Node, form: ProductForm, weight: fx.Node, given: fx.Node, is_b: bool) -> Contraction:
    """A product with a weight in the place of b or a: axes before the last two run together, aligned at the right."""
    if form.k_of_b == -1:
        return Contraction(node, weight, -1, given, -1)
    weight_shape, shape = shape_of(weight), shape_of(given)
    if weight_shape is None or shape is None:
        return Contraction(node, weight, form.k_of_b if is_b else -1, reason="its shape is not known")
    axis = form.k_of_b if is_b and len(weight_shape) > 1 else -1
    input_axis = -1 if is_b or len(shape) == 1 else form.k_of_b
    shared = range(3, min(len(weight_shape), len(shape)) + 1)
    pairs = tuple((-k, -k) for k in shared if not (isinstance(shape[-k], int) and shape[-k] == 1))
    return Contraction(node, weight, axis, given, input_axis, pairs)


def _grouped(node: fx.Node, form: ProductForm, given: fx.Node, weight: fx.Node) -> Contraction:
    offsets = form.argument(node, form.offsets)
    shape, weight_shape = shape_of(given), shape_of(weight)
    if not isinstance(offsets, fx.Node) or len(shape or ()) != 2 or len(weight_shape or ()) != 3:
        return Contraction(node, weight, form.k_of_b, reason="a grouped product of another form than rows by experts")
    return Contraction(node, weight, form.k_of_b, given, -1, (), offsets)


def _attention(node: fx.Node, behind: Mapping[fx.Node, Any]) -> list[Contraction]:
    """A contraction for each value that a projection is multiplied with."""
    found: list[Contraction] = []
    for position, inputs in _ATTENTIONS[function_name(node)].items():
        weight = node.args[position] if position < len(node.args) else None
        if not isinstance(weight, fx.Node) or weight not in behind:
            continue
        values = dict.fromkeys(node.args[place] for place in inputs)
        found += [Contraction(node, weight, -1, value) for value in values if isinstance(value, fx.Node)]
        if not inputs:
            found.append(Contraction(node, weight, -1, reason=f"its input is computed inside {function_name(node)}"))
    return found


def _einsum(node: fx.Node, behind: Mapping[fx.Node, Any]) -> list[Contraction]:
    equation = node.args[0]
    if not isinstance(equation, str):
        return []
    given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    operands = list(given) if isinstance(given, (list, tuple)) else []
    left, _, right = equation.replace(" ", "").partition("->")
    letters = dict(zip(operands, left.split(","), strict=False))
    weights = [operand for operand in operands if isinstance(operand, fx.Node) and operand in behind]
    if len(weights) == len(operands):
        return []
    return [_einsum_operand(node, weight, letters, right) for weight in weights]


def _einsum_operand(node: fx.Node, weight: fx.Node, letters: Mapping[Any, str], right: str) -> Contraction:
    mine = letters[weight]
    others = [operand for operand in letters if operand is not weight]
    summed = [i - len(mine) for i, letter in enumerate(mine) if right and letter not in right]
    if len(summed) != 1:
        return Contraction(node, weight, None, reason="its einsum does not sum over exactly one of its axes")
    if len(others) != 1 or "." in "".join(letters.values()):
        return Contraction(node, weight, summed[0], reason="its einsum is not one of two operands with letters alone")
    its = letters[others[0]]
    letter = mine[summed[0]]
    if letter not in its or any(other not in right for other in its if other != letter):
        return Contraction(node, weight, summed[0], reason="its einsum sums over an axis of one operand alone")
    pairs = tuple(
        (i - len(mine), its.index(one) - len(its)) for i, one in enumerate(mine) if one in its and one in right
    )
    return Contraction(node, weight, summed[0], others[0], its.index(letter) - len(its), pairs)
