"""Reading an RMS norm in a graph: the function itself, or spelled out in arithmetic.

    F.rms_norm(h, [features], gain, eps)
    gain * (h * rsqrt(mean(h ** 2, -1, keepdim=True) + eps))        casts anywhere; h * h and square(h); / sqrt(...)

The gain is a parameter g, or 1 + g; without one it is 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.program import value_of
from ptqc.views import function_name

__all__ = ["Gain", "RmsNorm", "rms_norm_of"]

_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type_as", "type"})
_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__"})
_SUMS = frozenset({"add", "__add__", "__radd__"})


@dataclass(frozen=True)
class Gain:
    """offset + the parameter that a get_attr node reads (None: no parameter)."""

    parameter: fx.Node | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class RmsNorm:
    """h: the value that is normed, before casts."""

    h: fx.Node
    gain: Gain
    eps: float


def rms_norm_of(node: fx.Node) -> RmsNorm | None:
    """`node` as an RMS norm over the last axis, None if it is none."""
    if function_name(node) == "rms_norm":
        return _called(node)
    outer = _uncast(node)
    bare = _normed(outer)
    if bare is not None:
        return RmsNorm(bare[0], Gain(None, 1.0), bare[1])
    if function_name(outer) not in _PRODUCTS or len(outer.args) != 2:
        return None
    for factor, other in (outer.args, outer.args[::-1]):
        gain = _gain(factor)
        inner = _normed(_uncast(other)) if gain is not None and isinstance(other, fx.Node) else None
        if gain is not None and inner is not None:
            return RmsNorm(inner[0], gain, inner[1])
    return None


def _called(node: fx.Node) -> RmsNorm | None:
    names = ("input", "normalized_shape", "weight", "eps")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    h, shape, gain, eps = (given.get(name) for name in names)
    if not isinstance(h, fx.Node) or not isinstance(shape, (tuple, list)) or len(shape) != 1:
        return None
    if eps is None and value_of(h).dtype == torch.float32:
        eps = torch.finfo(torch.float32).eps
    read = Gain(None, 1.0) if gain is None else _gain(gain)
    return None if read is None or not isinstance(eps, float) else RmsNorm(h, read, eps)


def _gain(node: Any) -> Gain | None:
    """g or 1 + g, casts left aside; g [features]."""
    node = _uncast(node) if isinstance(node, fx.Node) else node
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        value = value_of(node)
        return Gain(node) if isinstance(value, Tensor) and value.ndim == 1 else None
    if function_name(node) not in _SUMS or len(node.args) != 2:
        return None
    for number, other in (node.args, node.args[::-1]):
        if isinstance(number, (int, float)) and isinstance(other, fx.Node):
            inner = _gain(other)
            return None if inner is None else Gain(inner.parameter, inner.offset + number)
    return None


def _normed(node: fx.Node) -> tuple[fx.Node, float] | None:
    """h and eps of h * rsqrt(mean(h ** 2) + eps), or of h / sqrt(...)."""
    name, arguments = function_name(node), node.args
    if len(arguments) != 2 or not all(isinstance(argument, fx.Node) for argument in arguments):
        return None
    pairs = {"truediv": [arguments], "div": [arguments], "__truediv__": [arguments]}
    pairs |= {product: [arguments, arguments[::-1]] for product in _PRODUCTS}
    root = "rsqrt" if name in _PRODUCTS else "sqrt"
    for h, factor in pairs.get(name, []):
        assert isinstance(h, fx.Node) and isinstance(factor, fx.Node)
        if function_name(factor) != root:
            continue
        mean = _mean_square(factor.args[0])
        if mean is not None and mean[0] is _uncast(h):
            return mean
    return None


def _mean_square(node: Any) -> tuple[fx.Node, float] | None:
    """h and eps of mean(h ** 2, -1, keepdim=True) + eps."""
    if not isinstance(node, fx.Node) or function_name(node) not in _SUMS or len(node.args) != 2:
        return None
    mean, eps = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
    if not isinstance(mean, fx.Node) or not isinstance(eps, float) or function_name(mean) != "mean":
        return None
    options = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | dict(mean.kwargs)
    square, axis = options["input"], options.get("dim")
    axis = axis[0] if isinstance(axis, (tuple, list)) and len(axis) == 1 else axis
    if not options.get("keepdim") or not isinstance(square, fx.Node) or axis not in (-1, value_of(square).ndim - 1):
        return None
    h = square.args[0]
    power = square.args[1] if len(square.args) > 1 else square.kwargs.get("exponent")
    is_square = {"pow": power == 2, "__pow__": power == 2, "square": True, "mul": power is h}.get(function_name(square))
    return (_uncast(h), eps) if is_square and isinstance(h, fx.Node) else None


def _uncast(node: fx.Node) -> fx.Node:
    """The value before casts among floating-point types."""
    while function_name(node) in _CASTS and isinstance(node.args[0], fx.Node):
        before, after = value_of(node.args[0]), value_of(node)
        if not (isinstance(after, Tensor) and isinstance(before, Tensor) and before.is_floating_point()):
            break
        node = node.args[0]
    return node
