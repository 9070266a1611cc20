"""Operators that mix the elements of an axis: sums, means, pools, rankings. The scale must not vary along it."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from ptqc.passes.groups.labels import Scaled
from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.trace import Result, Rule, Trace
from ptqc.program import value_of

__all__ = ["REDUCTIONS"]

_DEGREES: dict[str, int] = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "nansum": 1, "linalg_vector_norm": 1, "var": 2, "std": 1,
}  # fmt: skip
_POOLS = {
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "upsample_nearest1d": 1, "upsample_nearest2d": 2,
    "upsample_linear1d": 1, "upsample_bilinear2d": 2,
}  # fmt: skip
"""Operators that mix places along so many last axes: means, maxima and interpolations."""


def _axes(argument: Any, rank: int) -> list[int]:
    if argument is None or argument == []:
        return list(range(rank))
    axes = argument if isinstance(argument, (list, tuple)) else [argument]
    return [axis % rank for axis in axes]


def _reduction(trace: Trace, node: fx.Node) -> Result:
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    name = operator_name(node)
    if name == "linalg_vector_norm" and len(node.args) > 1 and node.args[1] == 0:
        trace.kill(scaled.labels, node, "has its zeros counted")
        return None
    at = 2 if name == "linalg_vector_norm" else 1
    given = node.args[at] if len(node.args) > at else node.kwargs.get("dim")
    axes = _axes(given, scaled.labels.ndim)
    labels = trace.constant_along(scaled.labels, axes, node, f"is reduced over its channels by {name}")
    shape = shape_of(node)
    if labels.ndim != len(shape):
        labels = labels.squeeze(axes)
    return Scaled(labels.expand(shape), scaled.degree * _DEGREES[name])


def _pooled(trace: Trace, node: fx.Node) -> Result:
    """A pooling or interpolation: places are mixed, channels are not."""
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    name = operator_name(node)
    axes = [-1 - at for at in range(_POOLS[name])]
    labels = trace.constant_along(scaled.labels, axes, node, f"varies between the places of {name}")
    result = Scaled(labels.expand(shape_of(node)), scaled.degree)
    return [result, None] if isinstance(value_of(node), (tuple, list)) else result


def _running(trace: Trace, node: fx.Node) -> Result:
    """cumsum: a sum along one axis that keeps it."""
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    axis: Any = node.args[1]
    labels = trace.constant_along(scaled.labels, [axis], node, "is summed over its channels")
    return Scaled(labels.expand(shape_of(node)), scaled.degree)


def _ranked(trace: Trace, node: fx.Node) -> Result:
    """topk and sort along an axis on which the scale does not vary: values keep it, places do not depend on it."""
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    at = 2 if operator_name(node) == "topk" else 1
    axis: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", -1)
    labels = trace.constant_along(scaled.labels, [axis], node, "is ranked")
    return [Scaled(labels.expand(shape_of(node)), scaled.degree), None]


REDUCTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(_DEGREES, _reduction),
    **dict.fromkeys(_POOLS, _pooled),
    **dict.fromkeys(("topk", "sort"), _ranked),
    "cumsum": _running,
}
"""ATen operator -> rule."""
