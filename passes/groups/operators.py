"""Operators: what each ATen operator does to the labels of its operands. A row of data, or a function of one step.

An operator that is in none of the tables kills what enters it, with its name as the reason.
"""

import logging
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.passes.groups.contractions import CONTRACTIONS, contracted, contraction
from ptqc.passes.groups.homogeneity import POINTWISE, degree_of
from ptqc.passes.groups.labels import UNSCALED, ZERO, Scaled, along, compact, disagreeing, largest
from ptqc.passes.groups.moves import (
    KNOWN_FAILURES,
    MOVES,
    TAKES,
    concrete,
    is_float,
    is_symbolic,
    looked_up,
    moved,
    operator_name,
    shape_of,
    taken,
    taken_axes,
)
from ptqc.passes.groups.trace import SCORES, Result, Trace
from ptqc.program import value_of

__all__ = ["RULES", "apply"]

log = logging.getLogger("ptqc")

Rule = Callable[[Trace, fx.Node], Result]

_RESIDUAL = "reaches a sum with a value that is not scaled alike (a residual)"
_SHAPE_ONLY = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
     "new_full", "new_empty", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset"}
)  # fmt: skip
_NORMALISES = {
    "native_layer_norm": "is normalised again (layer norm)",
    "_fused_rms_norm": "is normalised again (RMS norm)",
    "native_group_norm": "is normalised again (group norm)",
    "native_batch_norm": "is normalised again (batch norm)",
    "_native_batch_norm_legit_no_training": "is normalised again (batch norm)",
    "cudnn_batch_norm": "is normalised again (batch norm)",
    "_batch_norm_no_update": "is normalised again (batch norm)",
}
_REDUCTIONS: dict[str, int] = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "nansum": 1, "linalg_vector_norm": 1, "var": 2, "std": 1,
}  # fmt: skip
_POOLS = {
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "upsample_nearest1d": 1, "upsample_nearest2d": 2,
    "upsample_linear1d": 1, "upsample_bilinear2d": 2,
}  # fmt: skip
"""Operators that mix places along so many last axes: means, maxima and interpolations."""
_ATTENTIONS = frozenset(
    {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
     "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
     "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
     "_scaled_dot_product_fused_attention_overrideable"}
)  # fmt: skip


def apply(trace: Trace, node: fx.Node) -> Result:
    """Labels of a node from those of its inputs."""
    name = operator_name(node)
    if name not in _SHAPE_ONLY and any(is_symbolic(one) for one in (node, *node.all_input_nodes)):
        trace.kill_inputs(node, "meets a size that depends on the data")
        return None
    rule = RULES.get(name)
    if rule is not None:
        try:
            return rule(trace, node)
        except KNOWN_FAILURES as failure:
            log.debug("labels of %s: %s", node.format_node(), failure)
            trace.kill_inputs(node, f"passes through a form of {name} that is not known")
            return None
    trace.kill_inputs(node, f"passes through {name}, which is not known to keep a scale")
    return None


def _others_are_unscaled(trace: Trace, node: fx.Node, allowed: tuple[Any, ...]) -> bool:
    """Whether no input but the allowed ones is scaled; otherwise everything that enters dies."""
    if all(source in allowed or trace.values.get(source) is None for source in node.all_input_nodes):
        return True
    trace.kill_inputs(node, f"steers {operator_name(node)}")
    return False


def _nothing(trace: Trace, node: fx.Node) -> Result:
    return None


def _move(trace: Trace, node: fx.Node) -> Result:
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    if not _others_are_unscaled(trace, node, (node.args[0],)):
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
    return trace.agreeing(node.args[0], node.args[1], node, _RESIDUAL)


def _maximum(trace: Trace, node: fx.Node) -> Result:
    return trace.agreeing(node.args[0], node.args[1], node, "is compared with a value that is not scaled alike")


def _where(trace: Trace, node: fx.Node) -> Result:
    if not _others_are_unscaled(trace, node, tuple(node.args[1:])):
        return None
    one, other = node.args[1], node.args[2]
    return trace.agreeing(one, other, node, "is chosen against a value that is not scaled alike")


def _masked_fill(trace: Trace, node: fx.Node) -> Result:
    scaled, filled = trace.of(node.args[0]), node.args[2]
    if not _others_are_unscaled(trace, node, (node.args[0],)) or scaled is None:
        return None
    is_free = filled in trace.facts.zeros if isinstance(filled, fx.Node) else filled == 0 or math.isinf(filled)  # type: ignore[arg-type]
    if is_free:
        return Scaled(scaled.labels.expand(shape_of(node)), scaled.degree)
    trace.kill(scaled.labels, node, "is filled with a number where a mask says so")
    return None


def _comparison(trace: Trace, node: fx.Node) -> Result:
    trace.agreeing(node.args[0], node.args[1], node, "is compared with a value that is not scaled alike")
    return None


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
    if not _others_are_unscaled(trace, node, (source,)) or scaled is None:
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
    if not _others_are_unscaled(trace, node, (base, source)):
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
    return Scaled(labels.expand(shape), scaled.degree * _REDUCTIONS[name])


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


def _gated(trace: Trace, node: fx.Node) -> Result:
    """glu: the first half of an axis times the sigmoid of the second."""
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    axis: Any = node.args[1] if len(node.args) > 1 else -1
    kept, gate = scaled.labels.chunk(2, axis)
    trace.kill(gate, node, "passes through sigmoid, which is not positively homogeneous")
    return Scaled(trace.channels.cleaned(kept), scaled.degree)


def _running(trace: Trace, node: fx.Node) -> Result:
    """cumsum: a sum along one axis that keeps it."""
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    axis: Any = node.args[1]
    labels = trace.constant_along(scaled.labels, [axis], node, "is summed over its channels")
    return Scaled(labels.expand(shape_of(node)), scaled.degree)


def _contraction(trace: Trace, node: fx.Node) -> Result:
    found = contraction(node)
    if found is None or not _others_are_unscaled(trace, node, (found.a, found.b, found.bias)):
        trace.kill_inputs(node, f"passes through a form of {operator_name(node)} that is not known")
        return None
    product = contracted(trace, found)
    return product if found.bias is None else _plus(trace, node, product, found.bias)


def _plus(trace: Trace, node: fx.Node, product: Scaled | None, bias: Any) -> Scaled | None:
    """A value plus a bias, as if it were an addition of its own."""
    if bias is None:
        return product
    trace.values[node] = product
    result = trace.agreeing(node, bias, node, _RESIDUAL)
    del trace.values[node]
    return result


def _attention(trace: Trace, node: fx.Node) -> Result:
    """Scaled dot-product attention: a scale of the values passes to the result, head by head."""
    value = node.args[2]
    scaled = trace.of(value)
    if not _others_are_unscaled_attention(trace, node) or scaled is None:
        return None
    labels = trace.constant_along(scaled.labels, [-2], node, "varies along the sequence")
    shape = shape_of(node)
    heads, per = shape[-3], labels.shape[-3]
    if heads != per:
        labels = labels.repeat_interleave(heads // per, -3)
    result = Scaled(labels.expand(shape), scaled.degree)
    return [result] if isinstance(value_of(node), (tuple, list)) else result


def _others_are_unscaled_attention(trace: Trace, node: fx.Node) -> bool:
    for source in node.all_input_nodes:
        scaled = trace.of(source)
        if scaled is not None and (source is not node.args[2] or source in node.args[:2]):
            trace.kill(scaled.labels, node, f"{SCORES} (attention scores)")
    return True


def _convolution(trace: Trace, node: fx.Node) -> Result:
    x, weight, bias = node.args[0], node.args[1], node.args[2]
    is_transposed, groups = node.args[6], node.args[8]
    if is_transposed or not isinstance(weight, fx.Node) or not isinstance(x, fx.Node):
        trace.kill_inputs(node, "passes through a transposed convolution")
        return None
    product = _convolved(trace, node, x, weight, int(groups))  # type: ignore[arg-type]
    return _plus_channels(trace, node, product, bias)


def _convolved(trace: Trace, node: fx.Node, x: fx.Node, weight: fx.Node, groups: int) -> Scaled | None:
    """1. a depthwise one keeps channels; 2. others are contractions over channels; 3. rows of the kernel are rows."""
    value, kernel = trace.of(x), trace.of(weight)
    shape, space = shape_of(node), list(range(2, len(shape_of(node))))
    if value is None and kernel is None:
        return None
    inputs, wide = shape_of(x)[1], shape_of(weight)[1]
    columns = None
    if value is not None:
        columns = trace.constant_along(value.labels, [0, *space], node, "varies between the places of a convolution")
        columns = columns.flatten()
    if columns is not None and groups == inputs:
        if kernel is not None:
            trace.kill_inputs(node, "is multiplied by another scaled value")
            return None
        rows = columns.repeat_interleave(shape[1] // inputs)
        return Scaled(along(trace.channels.cleaned(rows), 1, shape), value.degree)  # type: ignore[union-attr]
    if columns is not None:
        columns = trace.constant_along(columns.view(groups, wide), [0], node, "differs between the groups")[0]
    rows_labels = None
    if kernel is not None:
        flat, differing = largest(trace.constant_along(kernel.labels, space, node, "varies over the kernel"), 1)
        if not differing.numel():
            rows_labels = flat
    if columns is None:
        if rows_labels is None:
            trace.kill(kernel.labels, node, "a weight that reads it also reads something that is not scaled alike")  # type: ignore[union-attr]
            return None
        return Scaled(along(trace.channels.cleaned(rows_labels).flatten(), 1, shape), kernel.degree)  # type: ignore[union-attr]
    if kernel is None:
        operand = trace.facts.operands.get(weight)
        labels = columns.clamp(min=UNSCALED).view(1, wide, *([1] * len(space)))
        if operand is None or not trace.ask(operand, labels, -value.degree, node, True):  # type: ignore[union-attr]
            trace.kill(columns, node, "is contracted by a convolution")
        return None
    theirs = trace.constant_along(kernel.labels, [0, *space], node, "varies over the kernel").flatten()
    if value.degree + kernel.degree != 0:  # type: ignore[union-attr]
        trace.kill_inputs(node, "a weight would need two powers of the scale")
        return None
    differs = disagreeing(columns, theirs)
    for side in (columns, theirs):
        trace.kill(side[differs], node, "a weight that reads it also reads something that is not scaled alike")
    return None


def _norm(trace: Trace, node: fx.Node) -> Result:
    """A norm: its input is normalised again; its weight and bias scale the result."""
    name = operator_name(node)
    x = node.args[0]
    value = trace.of(x)
    if value is not None:
        trace.kill(value.labels, node, _NORMALISES[name])
    at = 2 if name in ("native_layer_norm", "_fused_rms_norm") else 1
    weight = node.args[at] if len(node.args) > at else None
    bias = node.args[at + 1] if name != "_fused_rms_norm" and len(node.args) > at + 1 else None
    gain = trace.of(weight)
    shape = shape_of(node)
    if name in ("native_layer_norm", "_fused_rms_norm"):
        spread = None if gain is None else Scaled(gain.labels.expand(shape), gain.degree)
        return [_plus(trace, node, spread, bias)]
    spread = None if gain is None else Scaled(along(gain.labels, 1, shape), gain.degree)
    return [_plus_channels(trace, node, spread, bias)]


def _plus_channels(trace: Trace, node: fx.Node, product: Scaled | None, bias: Any) -> Scaled | None:
    """Like `_plus` for a bias [channels] that lies along axis 1 of the result."""
    shift = trace.of(bias)
    if bias is None or (product is None and shift is None):
        return product
    shape = shape_of(node)
    none = torch.full((shape[1],), UNSCALED, dtype=torch.int32)
    one = none if product is None else compact(product.labels).flatten().expand(shape[1])  # varies along axis 1 alone
    if product is not None and shift is None:
        operand = trace.facts.operands.get(bias)
        if operand is not None and trace.ask(operand, one, product.degree, node):
            return product
    other = none if shift is None else shift.labels
    differs = disagreeing(one, other)
    if product is not None and shift is not None and product.degree != shift.degree:
        differs = torch.ones_like(differs)
    for side in (one, other):
        trace.kill(side[differs], node, _RESIDUAL)
    return None if product is None else Scaled(trace.channels.cleaned(product.labels), product.degree)


def _ranked(trace: Trace, node: fx.Node) -> Result:
    """topk and sort along an axis on which the scale does not vary: values keep it, places do not depend on it."""
    scaled = trace.of(node.args[0])
    if scaled is None:
        return None
    at = 2 if operator_name(node) == "topk" else 1
    axis: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", -1)
    labels = trace.constant_along(scaled.labels, [axis], node, "is ranked")
    return [Scaled(labels.expand(shape_of(node)), scaled.degree), None]


def _fails(trace: Trace, node: fx.Node) -> Result:
    trace.kill_inputs(node, f"passes through {operator_name(node)}, which is not positively homogeneous")
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(TAKES, _take),
    **dict.fromkeys(_SHAPE_ONLY, _nothing),
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(CONTRACTIONS, _contraction),
    **dict.fromkeys(_NORMALISES, _norm),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_ATTENTIONS, _attention),
    **dict.fromkeys(_POOLS, _pooled),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne"), _comparison),
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("maximum", "minimum"), _maximum),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scattered_slice),
    **dict.fromkeys(("index_put", "index_add", "scatter", "scatter_add", "index_copy"), _put),
    **dict.fromkeys(("topk", "sort"), _ranked),
    **dict.fromkeys(("_softmax", "softmax", "_log_softmax", "_safe_softmax", "logsumexp"), _fails),
    "getitem": _item,
    "glu": _gated,
    "_to_copy": _cast,
    "mul": _product,
    "div": _quotient,
    "where": _where,
    "masked_fill": _masked_fill,
    "cumsum": _running,
    "convolution": _convolution,
}
"""ATen operator -> rule."""
