"""Operators that put elements in other places: views, joins, and reads and writes where the data says."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.passes.groups.labels import ZERO, Scaled, compact, disagreeing
from ptqc.passes.groups.moves import (
    MOVES,
    TAKES,
    concrete,
    looked_up,
    moved,
    operator_name,
    shape_of,
    taken,
    taken_axes,
)
from ptqc.passes.groups.trace import Result, Rule, Trace
from ptqc.program import value_of

__all__ = ["PLACES"]


def _move(trace: Trace, node: fx.Node) -> Result:
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    if not trace.takes_scales_only_from(node, (node.args[0],)):
        return None
    if operator_name(node) == "constant_pad_nd" and len(node.args) > 2 and node.args[2] != 0:
        trace.kill(scaled.labels, node, "is padded with a number")
        return None
    result = moved(node, scaled.labels, ZERO)
    if isinstance(result, Tensor):
        return Scaled(result, scaled.degree)
    return [Scaled(part, scaled.degree) for part in result]


def _item(trace: Trace, node: fx.Node) -> Result:
    values, at = trace.values.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
    return values[at] if isinstance(values, list) and isinstance(at, int) and at < len(values) else None


def _joined(trace: Trace, node: fx.Node) -> Result:
    """cat and stack: the operator itself on labels; what is not scaled keeps its elements unscaled."""
    parts: Any = node.args[0]
    scaled = [trace.of(part) for part in parts]
    degrees = [part.degree for part in scaled if part is not None]
    if not degrees:
        return None
    labels = []
    for part, found in zip(parts, scaled, strict=True):
        if found is not None and found.degree != degrees[0]:
            trace.kill(found.labels, node, "two powers of the scale meet")
            found = None
        rank = len(shape_of(part))
        labels.append(trace.labels_of(part, found, rank).expand(shape_of(part)))
    labels = [part for part in labels if part.shape != (0,)]
    result: Tensor = node.target(labels, *concrete(node.args[1:]))  # type: ignore[operator]
    return Scaled(trace.channels.cleaned(result), degrees[0])


def _scattered_slice(trace: Trace, node: fx.Node) -> Result:
    """slice_scatter, select_scatter: the operator itself on the labels of both."""
    base, source = node.args[0], node.args[1]
    a, b = trace.of(base), trace.of(source)
    if a is None and b is None:
        return None
    if a is not None and b is not None and a.degree != b.degree:
        trace.kill_inputs(node, "two powers of the scale meet")
        return None
    left = trace.labels_of(base, a, len(shape_of(node))).expand(shape_of(node))
    right = trace.labels_of(source, b, 0)
    if isinstance(source, fx.Node):
        right = right.expand(shape_of(source))
    result: Tensor = node.target(left, right, *concrete(node.args[2:]), **node.kwargs)  # type: ignore[operator]
    return Scaled(result, (a or b).degree)  # type: ignore[union-attr]


def _take(trace: Trace, node: fx.Node) -> Result:
    source = node.args[0]
    scaled = trace.of(source)
    if not trace.takes_scales_only_from(node, (source,)) or scaled is None:
        return None
    if operator_name(node) == "embedding" and scaled.degree < 0:
        trace.kill(scaled.labels, node, "is read by a weight that is tied to the embedding")
        return None
    if operator_name(node) == "index":
        indices: Any = node.args[1]
        if any(index is not None and value_of(index).dtype in (torch.bool, torch.uint8) for index in indices):
            trace.kill(scaled.labels, node, "is selected by a mask")
            return None
    exact = looked_up(node, scaled.labels, trace.facts.constants)
    if exact is not None:
        return Scaled(exact, scaled.degree)
    reason = "is read at places that the data chooses"
    return Scaled(taken(node, trace.constant_along(scaled.labels, taken_axes(node), node, reason)), scaled.degree)


def _put(trace: Trace, node: fx.Node) -> Result:
    """index_put, index_add, scatter*: rows written where the data says must not differ in scale."""
    name = operator_name(node)
    base = node.args[0]
    source = node.args[2] if name == "index_put" else node.args[3]
    if not trace.takes_scales_only_from(node, (base, source)):
        return None
    a, b = trace.of(base), trace.of(source)
    if a is None and b is None:
        return None
    shape = shape_of(node)
    if b is None or not isinstance(source, fx.Node):
        trace.kill_inputs(node, "is overwritten in part by unscaled values")
        return None
    written = _written(trace, node, name, b, shape)
    if written is None or (a is not None and a.degree != b.degree):
        trace.kill_inputs(node, f"passes through {name}, whose layout is not known")
        return None
    left = trace.labels_of(base, a, len(shape))
    differs = disagreeing(left, written)
    if bool(differs.any()):
        trace.kill(left.expand(differs.shape)[differs], node, "is written over unscaled values")
        trace.kill(written.expand(differs.shape)[differs], node, "is written over unscaled values")
    return Scaled(trace.channels.cleaned(torch.maximum(left, written).expand(shape)), b.degree)


def _written(trace: Trace, node: fx.Node, name: str, scaled: Scaled, shape: torch.Size) -> Tensor | None:
    """Labels of the rows that are written, broadcastable to the result; None if the form is not known."""
    reason = "is written at places that the data chooses"
    if name != "index_put":
        axis: Any = node.args[1]
        labels = trace.constant_along(scaled.labels, [axis], node, reason)
        fits = all(labels.shape[at] in (1, size) for at, size in enumerate(shape))
        return compact(labels) if fits and labels.ndim == len(shape) else None
    indices: Any = node.args[1]
    count = len([index for index in indices if index is not None])
    if any(index is None for index in indices[:count]) or any(
        value_of(index).dtype in (torch.bool, torch.uint8) for index in indices[:count]
    ):
        return None
    rows = len(torch.broadcast_shapes(*(shape_of(index) for index in indices[:count])))
    rest = len(shape) - count
    labels = scaled.labels.reshape((1,) * max(0, rows + rest - scaled.labels.ndim) + tuple(scaled.labels.shape))
    labels = trace.constant_along(labels, range(rows), node, reason)
    return compact(labels.reshape((1,) * count + tuple(labels.shape[rows:])))


PLACES: Mapping[str, Rule] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(TAKES, _take),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scattered_slice),
    **dict.fromkeys(("index_put", "index_add", "scatter", "scatter_add", "index_copy"), _put),
    "getitem": _item,
}
"""ATen operator -> rule."""
