"""Elementwise operators: sums need equal scales, products multiply them, functions must be positively homogeneous."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from ptqc.passes.groups.homogeneity import POINTWISE, degree_of
from ptqc.passes.groups.labels import Scaled
from ptqc.passes.groups.moves import is_float, operator_name, shape_of
from ptqc.passes.groups.trace import RESIDUAL, Result, Rule, Trace

__all__ = ["ELEMENTWISE"]


def _cast(trace: Trace, node: fx.Node) -> Result:
    scaled = trace.of(node.args[0])
    if scaled is None or is_float(node):
        return scaled
    trace.kill(scaled.labels, node, "is rounded to integers")
    return None


def _pointwise(trace: Trace, node: fx.Node) -> Result:
    scaled = trace.of(node.args[0])
    if scaled is None:
        trace.kill_inputs(node, f"steers {operator_name(node)}")
        return None
    name = operator_name(node)
    numbers = tuple(node.args[1:])
    power: Fraction | None = None
    if all(number is None or isinstance(number, (int, float)) for number in numbers):
        power = degree_of(name, () if name == "gelu" else numbers)
    if power is None:
        trace.kill_inputs(node, f"passes through {name}, which is not positively homogeneous")
        return None
    return None if power == 0 else Scaled(scaled.labels, scaled.degree * power)


def _product(trace: Trace, node: fx.Node) -> Result:
    return _multiplied(trace, node, node.args[0], node.args[1], 1)


def _quotient(trace: Trace, node: fx.Node) -> Result:
    if node.kwargs.get("rounding_mode") is not None:
        trace.kill_inputs(node, "passes through a rounded division")
        return None
    return _multiplied(trace, node, node.args[0], node.args[1], -1)


def _multiplied(trace: Trace, node: fx.Node, one: Any, other: Any, sign: int) -> Scaled | None:
    """one * other ** sign, elementwise: scales multiply."""
    a, b = trace.of(one), trace.of(other)
    shape = shape_of(node)
    if b is not None:
        b = Scaled(b.labels, b.degree * sign)
    if a is None or b is None:
        alone = a or b
        return None if alone is None else Scaled(alone.labels.expand(shape), alone.degree)
    left, right = trace.labels_of(one, a, len(shape)), trace.labels_of(other, b, len(shape))
    both = (left >= 0) & (right >= 0)
    wrong = both & (left != right)
    merged = torch.maximum(left, right)
    reason = "is multiplied by another scaled value"
    if bool(both.any()):
        only = (merged >= 0) & ~both
        degree = a.degree + b.degree
        wrong = wrong | only
    else:
        degree = a.degree
        if a.degree != b.degree:
            wrong = right >= 0
    if bool(wrong.any()):
        trace.kill(left.expand(wrong.shape)[wrong], node, reason)
        trace.kill(right.expand(wrong.shape)[wrong], node, reason)
    merged = trace.channels.cleaned(merged.expand(shape))
    return None if degree == 0 else Scaled(merged, degree)


def _sum(trace: Trace, node: fx.Node) -> Result:
    return trace.agreeing(node.args[0], node.args[1], node, RESIDUAL)


def _maximum(trace: Trace, node: fx.Node) -> Result:
    return trace.agreeing(node.args[0], node.args[1], node, "is compared with a value that is not scaled alike")


def _where(trace: Trace, node: fx.Node) -> Result:
    if not trace.takes_scales_only_from(node, tuple(node.args[1:])):
        return None
    one, other = node.args[1], node.args[2]
    return trace.agreeing(one, other, node, "is chosen against a value that is not scaled alike")


def _masked_fill(trace: Trace, node: fx.Node) -> Result:
    scaled, filled = trace.of(node.args[0]), node.args[2]
    if not trace.takes_scales_only_from(node, (node.args[0],)) or scaled is None:
        return None
    is_free = filled in trace.facts.zeros if isinstance(filled, fx.Node) else filled == 0 or math.isinf(filled)  # type: ignore[arg-type]
    if is_free:
        return Scaled(scaled.labels.expand(shape_of(node)), scaled.degree)
    trace.kill(scaled.labels, node, "is filled with a number where a mask says so")
    return None


def _comparison(trace: Trace, node: fx.Node) -> Result:
    trace.agreeing(node.args[0], node.args[1], node, "is compared with a value that is not scaled alike")
    return None


def _gated(trace: Trace, node: fx.Node) -> Result:
    """glu: the first half of an axis times the sigmoid of the second."""
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    axis: Any = node.args[1] if len(node.args) > 1 else -1
    kept, gate = scaled.labels.chunk(2, axis)
    trace.kill(gate, node, "passes through sigmoid, which is not positively homogeneous")
    return Scaled(trace.channels.cleaned(kept), scaled.degree)


def _fails(trace: Trace, node: fx.Node) -> Result:
    trace.kill_inputs(node, f"passes through {operator_name(node)}, which is not positively homogeneous")
    return None


ELEMENTWISE: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne"), _comparison),
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("maximum", "minimum"), _maximum),
    **dict.fromkeys(("_softmax", "softmax", "_log_softmax", "_safe_softmax", "logsumexp"), _fails),
    "_to_copy": _cast,
    "div": _quotient,
    "glu": _gated,
    "masked_fill": _masked_fill,
    "mul": _product,
    "where": _where,
}
"""ATen operator -> rule."""
