"""Moves: operators that only put elements elsewhere, executed on index tensors by the very same ATen operator.

Whatever the layout (fused projections, interleaved heads, grouped key and value heads, chunks), the result says where
every element came from; there is no code per layout.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.program import value_of
from ptqc.views import function_name

__all__ = [
    "KEEPS",
    "KNOWN_FAILURES",
    "MOVES",
    "TAKES",
    "is_float",
    "is_symbolic",
    "looked_up",
    "moved",
    "operator_name",
    "shape_of",
    "taken",
    "taken_axes",
]

KEEPS = frozenset({"alias", "clone", "contiguous", "detach", "lift", "lift_fresh", "lift_fresh_copy", "view_as"})
"""The same elements in the same places."""

MOVES = frozenset(
    {"_reshape_alias", "_unsafe_view", "channel_shuffle", "chunk", "constant_pad_nd", "diagonal", "expand", "flip",
     "im2col", "movedim", "native_channel_shuffle", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat",
     "repeat_interleave", "reshape", "roll", "rot90", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
     "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes",
     "unsqueeze", "view"} | KEEPS
)  # fmt: skip
"""One tensor in, its elements rearranged, repeated or left out; padding is zero."""

TAKES = frozenset({"index", "index_select", "gather", "embedding"})
"""Reads of rows that the data chooses."""

KNOWN_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What executing an operator on labels raises if it is called in a form that is not known."""

_RESHAPES = frozenset({"_reshape_alias", "_unsafe_view", "reshape", "unflatten", "view"})


def operator_name(node: fx.Node) -> str:
    """Name of the ATen operator of a node, without namespace and overload."""
    return function_name(node) if node.op == "call_function" else node.op


def shape_of(node: fx.Node) -> torch.Size:
    """Shape of the value of a node, of the first one where there are several."""
    value = value_of(node)
    first = value[0] if isinstance(value, (tuple, list)) else value
    return torch.Size([_hint(size) for size in first.shape])


def is_symbolic(node: fx.Node) -> bool:
    """Whether a size of the value of a node, or a number that it takes, is not even known for the batch at hand."""
    value = value_of(node)
    parts = list(value) if isinstance(value, (tuple, list)) else [value]
    sizes = [size for part in parts if isinstance(part, Tensor) for size in part.shape]
    numbers = [value_of(source) for source in node.all_input_nodes]
    return any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in [*sizes, *numbers])


def concrete(argument: Any) -> Any:
    """Arguments of an operator with the numbers in the place of nodes that stand for sizes."""
    return fx.map_arg(argument, lambda source: int(_hint(value_of(source))))


def _hint(size: Any) -> int:
    """A size, of the batch at hand where the graph leaves it open."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def is_float(node: fx.Node) -> bool:
    """Whether the value of a node is a tensor of floating-point numbers."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def moved(node: fx.Node, labels: Tensor, padding: int) -> Any:
    """The result of a move on another tensor in the place of its first argument. padding: what zeros become.

    labels: the shape of the first argument. Returns a tensor, or a list where the operator does.

    Raises TypeError for a view as another type, and what the operator raises (`KNOWN_FAILURES`).
    """
    name = operator_name(node)
    if name == "view" and isinstance(node.args[1], torch.dtype):
        raise TypeError("a view as another type is no move")
    if name in KEEPS:
        return labels
    if name in _RESHAPES:
        return labels.reshape(shape_of(node))
    if name == "expand":
        return labels.expand(shape_of(node))
    if name == "constant_pad_nd":
        return torch.ops.aten.constant_pad_nd(labels, concrete(node.args[1]), padding)
    if name == "im2col":
        return torch.ops.aten.im2col(labels.double() - padding, *node.args[1:]).to(labels.dtype) + padding
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(labels, *concrete(node.args[1:]), **node.kwargs)


def taken_axes(node: fx.Node) -> list[int]:
    """The axes of the source along which a take reads what the data says, negative."""
    name = operator_name(node)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(source))
    if name == "embedding":
        return [-rank]
    if name == "index":
        indices: Any = node.args[1]
        return [axis - rank for axis, index in enumerate(indices) if index is not None]
    axis: Any = node.args[1]
    return [axis - rank if axis >= 0 else axis]


def looked_up(node: fx.Node, labels: Tensor, constants: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """The result of a take whose places are constants of the graph, exactly; None if they are not."""
    name = operator_name(node)
    if name not in ("index", "index_select"):
        return None
    places = [source for source in node.all_input_nodes if source is not node.args[0]]
    if not places or any(place not in constants for place in places):
        return None
    arguments = fx.map_arg(node.args[1:], lambda place: constants[place])
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    result: Tensor = target(labels, *arguments)
    return result


def taken(node: fx.Node, labels: Tensor) -> Tensor:
    """The result of a take on labels that do not vary along its axes (any size there). The result's shape."""
    name = operator_name(node)
    shape = shape_of(node)
    if name == "embedding":
        return labels.narrow(0, 0, 1).squeeze(0).expand(shape)
    for axis in taken_axes(node):
        labels = labels.narrow(axis, 0, 1)
    if name == "index":
        indices: Any = node.args[1]
        ranks = [None if index is None else len(shape_of(index)) for index in indices]
        zeros = [None if rank is None else torch.zeros((1,) * rank, dtype=torch.int64) for rank in ranks]
        result: Tensor = torch.ops.aten.index(labels, zeros)
        return result.expand(shape)
    if name == "gather":
        for axis, size in enumerate(shape):
            if labels.shape[axis] > size:
                labels = labels.narrow(axis, 0, size)
    return labels.expand(shape)
