"""Layers: operators with weights (products, convolutions, norms), their biases, and attention."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ptqc.passes.groups.contractions import CONTRACTIONS, contracted, contraction
from ptqc.passes.groups.labels import UNSCALED, Scaled, along, compact, disagreeing, largest
from ptqc.passes.groups.moves import operator_name, shape_of
from ptqc.passes.groups.norms import NORMS
from ptqc.passes.groups.trace import RESIDUAL, SCORES, Result, Rule, Trace
from ptqc.program import value_of

__all__ = ["LAYERS"]

_ATTENTIONS = frozenset(
    {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
     "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
     "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
     "_scaled_dot_product_fused_attention_overrideable"}
)  # fmt: skip


def _contraction(trace: Trace, node: fx.Node) -> Result:
    found = contraction(node)
    if found is None or not trace.takes_scales_only_from(node, (found.a, found.b, found.bias)):
        trace.kill_inputs(node, f"passes through a form of {operator_name(node)} that is not known")
        return None
    product = contracted(trace, found)
    return product if found.bias is None else _plus(trace, node, product, found.bias)


def _plus(trace: Trace, node: fx.Node, product: Scaled | None, bias: Any) -> Scaled | None:
    """A value plus a bias, as if it were an addition of its own."""
    if bias is None:
        return product
    trace.values[node] = product
    result = trace.agreeing(node, bias, node, RESIDUAL)
    del trace.values[node]
    return result


def _attention(trace: Trace, node: fx.Node) -> Result:
    """Scaled dot-product attention: a scale of the values passes to the result, head by head."""
    value = node.args[2]
    scaled = trace.of(value)
    _kill_scores(trace, node)
    if scaled is None:
        return None
    labels = trace.constant_along(scaled.labels, [-2], node, "varies along the sequence")
    shape = shape_of(node)
    heads, per = shape[-3], labels.shape[-3]
    if heads != per:
        labels = labels.repeat_interleave(heads // per, -3)
    result = Scaled(labels.expand(shape), scaled.degree)
    return [result] if isinstance(value_of(node), (tuple, list)) else result


def _kill_scores(trace: Trace, node: fx.Node) -> None:
    """Queries, keys and masks must not be scaled."""
    for source in node.all_input_nodes:
        scaled = trace.of(source)
        if scaled is not None and (source is not node.args[2] or source in node.args[:2]):
            trace.kill(scaled.labels, node, f"{SCORES} (attention scores)")


def _convolution(trace: Trace, node: fx.Node) -> Result:
    x, weight, bias = node.args[0], node.args[1], node.args[2]
    is_transposed, groups = node.args[6], node.args[8]
    if is_transposed or not isinstance(weight, fx.Node) or not isinstance(x, fx.Node):
        trace.kill_inputs(node, "passes through a transposed convolution")
        return None
    product = _convolved(trace, node, x, weight, int(groups))  # type: ignore[arg-type]
    return _plus_channels(trace, node, product, bias)


_UNLIKE = "a weight that reads it also reads something that is not scaled alike"


def _convolved(trace: Trace, node: fx.Node, x: fx.Node, weight: fx.Node, groups: int) -> Scaled | None:
    """1. a depthwise one keeps channels; 2. others are contractions over channels; 3. rows of the kernel are rows."""
    value, kernel = trace.of(x), trace.of(weight)
    if value is None:
        return None if kernel is None else _kernel_rows(trace, node, kernel)
    space = list(range(2, value.labels.ndim))
    columns = trace.constant_along(value.labels, [0, *space], node, "varies between the places of a convolution")
    columns = columns.flatten()
    if groups == len(columns):
        if kernel is not None:
            trace.kill_inputs(node, "is multiplied by another scaled value")
            return None
        shape = shape_of(node)
        rows = trace.channels.cleaned(columns).repeat_interleave(shape[1] // groups)
        return Scaled(along(rows, 1, shape), value.degree)
    columns = trace.constant_along(columns.view(groups, -1), [0], node, "differs between the groups")[0]
    if kernel is not None:
        _cancel(trace, node, Scaled(columns, value.degree), kernel)
        return None
    operand = trace.facts.operands.get(weight)
    labels = columns.clamp(min=UNSCALED).view(1, -1, *([1] * len(space)))
    if operand is None or not trace.ask(operand, labels, -value.degree, node, is_consumer=True):
        trace.kill(columns, node, "is contracted by a convolution")
    return None


def _kernel_rows(trace: Trace, node: fx.Node, kernel: Scaled) -> Scaled | None:
    """A kernel whose output channels are scaled; scales of its input channels have nothing to cancel them."""
    space = list(range(2, kernel.labels.ndim))
    flat, differing = largest(trace.constant_along(kernel.labels, space, node, "varies over the kernel"), 1)
    if differing.numel():
        trace.kill(kernel.labels, node, _UNLIKE)
        return None
    shape = shape_of(node)
    rows = trace.channels.cleaned(flat).flatten().expand(shape[1])
    return Scaled(along(rows, 1, shape), kernel.degree)


def _cancel(trace: Trace, node: fx.Node, columns: Scaled, kernel: Scaled) -> None:
    """Input channels and the kernel's columns, which must be scaled against each other."""
    space = list(range(2, kernel.labels.ndim))
    theirs = trace.constant_along(kernel.labels, [0, *space], node, "varies over the kernel").flatten()
    if columns.degree + kernel.degree != 0:
        trace.kill_inputs(node, "a weight would need two powers of the scale")
        return
    differs = disagreeing(columns.labels, theirs)
    for side in (columns.labels, theirs):
        trace.kill(side[differs], node, _UNLIKE)


def _norm(trace: Trace, node: fx.Node) -> Result:
    """A norm: its input is normalised again; its weight and bias scale the result."""
    form, x = NORMS[operator_name(node)], node.args[0]
    value = trace.of(x)
    if value is not None:
        trace.kill(value.labels, node, f"is normalised again ({form.kind})")
    weight, bias = (node.args[at] if len(node.args) > at else None for at in (form.weight, form.weight + 1))
    bias = bias if form.has_bias else None
    gain = trace.of(weight)
    shape = shape_of(node)
    if form.is_last:
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
        trace.kill(side[differs], node, RESIDUAL)
    return None if product is None else Scaled(trace.channels.cleaned(product.labels), product.degree)


LAYERS: Mapping[str, Rule] = {
    **dict.fromkeys(CONTRACTIONS, _contraction),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(_ATTENTIONS, _attention),
    "convolution": _convolution,
}
"""ATen operator -> rule."""
