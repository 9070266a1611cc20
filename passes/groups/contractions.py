"""Contractions: matrix products seen as one, a: [batch, m, k] times b: [batch, k, n], and how scales meet in them.

1. a scale that is constant along k passes to the result;
2. a scale that varies along k must be met there by its inverse: a weight is asked to scale its columns that way;
3. anything else dies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ptqc.passes.groups.labels import UNSCALED, ZERO, Scaled, compact, disagreeing, largest
from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.trace import SCORES, Trace
from ptqc.product_forms import PRODUCTS

__all__ = ["CONTRACTIONS", "Contraction", "contracted", "contraction"]

CONTRACTIONS = frozenset(name for name, form in PRODUCTS.items() if form.is_aten and not form.sums_batch)
"""The operators of which it is known how scales meet in them."""


@dataclass(frozen=True)
class Contraction:
    """A product of a [.., m, k] and b [.., k, n]. k_of_a, k_of_b: the contracted axis of each, negative.

    bias: what is added. is_grouped: rows of a choose the matrix of b, so that nothing may vary between matrices.
    """

    node: fx.Node
    a: fx.Node
    b: fx.Node
    k_of_a: int
    k_of_b: int
    bias: object = None
    is_grouped: bool = False


def contraction(node: fx.Node) -> Contraction | None:
    """The contraction that a node is, None if it is none of a known form."""
    name = operator_name(node)
    if name not in CONTRACTIONS:
        return None
    form = PRODUCTS[name]
    a, b, bias = (form.argument(node, position) for position in (form.a, form.b, form.added))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    is_grouped = form.offsets is not None
    if is_grouped and (len(shape_of(a)) != 2 or len(shape_of(b)) != 3):
        return None
    return Contraction(node, a, b, -1, form.k_of_b, bias, is_grouped)


@dataclass(frozen=True, eq=False)
class _Side:
    """One factor: its labels as [batch, free, k] (compact or not), None if it is not scaled."""

    node: fx.Node
    scaled: Scaled | None
    labels: Tensor | None


def contracted(trace: Trace, found: Contraction) -> Scaled | None:
    """Labels of the product alone, without its bias."""
    a = _side(trace, found, found.a, found.k_of_a)
    b = _side(trace, found, found.b, found.k_of_b)
    if a.scaled is None and b.scaled is None:
        return None
    rows_a, columns_a = _split(a)
    rows_b, columns_b = _split(b)
    if columns_a is not None or columns_b is not None:
        _meet(trace, found, (a, columns_a), (b, columns_b))
    return _result(trace, found, (a, rows_a), (b, rows_b))


def _side(trace: Trace, found: Contraction, node: fx.Node, k: int) -> _Side:
    scaled = trace.of(node)
    if scaled is None:
        return _Side(node, None, None)
    labels = scaled.labels
    if labels.ndim == 1:
        labels = labels.unsqueeze(0)
        k = -1
    labels = labels if k == -1 else labels.transpose(-1, -2)
    if found.is_grouped and node is found.b:
        labels = trace.constant_along(labels, [0], found.node, "varies from expert to expert")[0]
    return _Side(node, scaled, labels)


def _split(side: _Side) -> tuple[Tensor | None, Tensor | None]:
    """(labels constant along k as [.., free, 1], None) or (None, labels that vary along k as [.., free, k])."""
    if side.labels is None:
        return None, None
    top, differing = largest(side.labels, -1)
    if differing.numel() == 0:
        return top, None
    return None, compact(side.labels)


def _meet(
    trace: Trace, found: Contraction, one: tuple[_Side, Tensor | None], other: tuple[_Side, Tensor | None]
) -> None:
    """Scales along the contracted axis: they must cancel, or a weight is asked to make them."""
    for (side, columns), (partner, theirs) in ((one, other), (other, one)):
        if columns is None:
            continue
        flat = trace.constant_along(columns, [-2], found.node, "the rows that a weight reads are not scaled alike")
        flat = trace.channels.cleaned(flat).squeeze(-2)
        if theirs is None:
            if partner.labels is not None or not _ask(trace, found, side, partner, flat):
                trace.kill(flat, found.node, _reason(trace, partner))
            continue
        against = trace.constant_along(theirs, [-2], found.node, "the columns of a weight differ from row to row")
        _cancel(trace, found, (side, flat), (partner, against.squeeze(-2)))


def _cancel(trace: Trace, found: Contraction, one: tuple[_Side, Tensor], other: tuple[_Side, Tensor]) -> None:
    (side, mine), (partner, theirs) = one, other
    assert side.scaled is not None and partner.scaled is not None
    mine, theirs = torch.broadcast_tensors(trace.channels.cleaned(mine), trace.channels.cleaned(theirs))
    if side.scaled.degree + partner.scaled.degree != 0:
        is_weight = side.node in trace.facts.operands or partner.node in trace.facts.operands
        reason = "a weight would need two powers of the scale" if is_weight else SCORES
        trace.kill(mine, found.node, reason)
        trace.kill(theirs, found.node, reason)
        return
    differs = disagreeing(mine, theirs)
    if not bool(differs.any()):
        return
    missing = differs & (theirs < 0)
    if bool(missing.any()) and _ask(trace, found, side, partner, torch.where(missing, mine, theirs)):
        differs &= ~missing
    trace.kill(mine[differs], found.node, "a weight that reads it also reads something that is not scaled alike")
    trace.kill(theirs[differs], found.node, "a weight that reads it also reads something that is not scaled alike")


def _ask(trace: Trace, found: Contraction, side: _Side, partner: _Side, columns: Tensor) -> bool:
    """Ask the weight behind `partner` to scale its columns against `columns` [.., k]."""
    operand = trace.facts.operands.get(partner.node)
    if operand is None or side.scaled is None:
        return False
    k = found.k_of_b if partner.node is found.b else found.k_of_a
    rank = len(shape_of(partner.node))
    labels = columns.unsqueeze(-1 if k == -2 else -2) if rank > 1 else columns
    labels = labels.reshape((1,) * max(0, rank - labels.ndim) + tuple(labels.shape))
    labels = torch.where(labels == ZERO, UNSCALED, labels)
    return trace.ask(operand, labels, -side.scaled.degree, found.node, is_consumer=True)


def _reason(trace: Trace, partner: _Side) -> str:
    if partner.node in trace.facts.operands:
        return "the weight that reads it cannot take a scale along one of its axes"
    return SCORES


def _result(
    trace: Trace, found: Contraction, one: tuple[_Side, Tensor | None], other: tuple[_Side, Tensor | None]
) -> Scaled | None:
    """Labels of the product from factors whose labels are constant along k."""
    (a, rows), (b, columns) = one, other
    shape = shape_of(found.node)
    if rows is not None and columns is not None:
        both = "two scaled values are multiplied"
        trace.kill(rows, found.node, both)
        trace.kill(columns, found.node, both)
        return None
    if rows is not None:
        assert a.scaled is not None
        labels, degree = rows, a.scaled.degree  # [.., m, 1]
    elif columns is not None:
        assert b.scaled is not None
        labels, degree = columns.transpose(-1, -2), b.scaled.degree  # [.., 1, n]
    else:
        return None
    labels = trace.channels.cleaned(labels)
    if labels.ndim > len(shape):
        labels = labels.reshape(_vector_shape(labels, len(shape)))
    return Scaled(labels.expand(shape), degree)


def _vector_shape(labels: Tensor, rank: int) -> Sequence[int]:
    """The shape without the axes of size 1 that a vector operand was given."""
    shape = list(labels.shape)
    for axis in range(len(shape) - 1, -1, -1):
        if len(shape) > rank and shape[axis] == 1:
            del shape[axis]
    return shape
