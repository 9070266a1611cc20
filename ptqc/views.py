"""Views of parameters: which axis of a parameter each axis of a value derived from it is.

Followed through casts, transposes, reshapes, slices, selections and gathers, in graphs of torch functions and in ATen
graphs. What is followed is the axes alone, never the values.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.program import value_of

__all__ = ["Axis", "View", "function_name", "is_matrix_transpose", "shape_of", "view_of"]

_TRANSPOSES = frozenset({"t", "transpose", "swapaxes", "swapdims", "mT", "T"})


@dataclass(frozen=True)
class Axis:
    """One axis of a view.

    of: the axis of the parameter it is, None for one of size 1 or one that mixes several. is_whole: it holds all of
    that axis, in order. index: the node whose values chose the entries along it (a gather), and slot: which axis of
    that node it is.
    """

    of: int | None = None
    is_whole: bool = True
    index: fx.Node | None = None
    slot: int = 0


@dataclass(frozen=True)
class View:
    """axes: of the value. picked: axes of the parameter that are gone, with the index that was selected."""

    axes: tuple[Axis, ...]
    picked: tuple[tuple[int, int | fx.Node], ...] = ()


def function_name(node: fx.Node) -> str:
    """Name of the function or method a node calls, without namespace or overload ("linear", "topk")."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0]


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The shape of a node's example value, None if it has none."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def is_matrix_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the last two axes of its first argument, and does nothing else to it."""
    source = value_of(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(source, Tensor) or source.ndim < 2:
        return False
    name, axes = function_name(node), node.args[1:]
    if name == "getattr":
        return axes == ("mT",) or (axes == ("T",) and source.ndim == 2)
    if name not in _TRANSPOSES or node.kwargs:
        return False
    numbers = sorted(axis % source.ndim for axis in axes if isinstance(axis, int))
    return numbers == [source.ndim - 2, source.ndim - 1] if axes else source.ndim == 2 or name == "mT"


def view_of(node: fx.Node, parameter: fx.Node, memory: dict[fx.Node, View | None] | None = None) -> View | None:
    """`node` as a view of `parameter`; None where it is none, or made in a way that is not followed.

    memory: views of this parameter found before, filled here.
    """
    known: dict[fx.Node, View | None] = {} if memory is None else memory
    if node not in known:
        known[node] = _view(node, parameter, known)
    return known[node]


def _view(node: fx.Node, parameter: fx.Node, known: dict[fx.Node, View | None]) -> View | None:
    shape = shape_of(node)
    if node is parameter:
        return None if shape is None else View(tuple(Axis(position) for position in range(len(shape))))
    if node.op not in ("call_function", "call_method") or shape is None:
        return None
    name = function_name(node)
    source = _source(node, parameter, known)
    if source is None:
        return None
    view, before = view_of(source, parameter, known), shape_of(source)
    if view is None or before is None:
        return None
    if name in _POINTWISE:
        return view if shape == before else None
    cut = node.args[0]
    if source is not cut and isinstance(cut, fx.Node):
        return _piece(node, cut, view, before, shape)
    rule = _RULES.get(name)
    return None if rule is None else rule(node, view, before, shape)


def _source(node: fx.Node, parameter: fx.Node, known: dict[fx.Node, View | None]) -> fx.Node | None:
    """The input that the view is of: the first, that behind a chunk, or any of a pointwise operation."""
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and function_name(first) in _PIECES and function_name(node) == "getitem":
        inner = first.args[0]
        return inner if isinstance(inner, fx.Node) else None
    if function_name(node) in _POINTWISE:
        operands = [value for value in node.args if isinstance(value, fx.Node)]
        views = [value for value in operands if view_of(value, parameter, known) is not None]
        same = [value for value in views if shape_of(value) == shape_of(node)]
        return same[0] if same else None
    return first if isinstance(first, fx.Node) else None


_POINTWISE = frozenset(
    {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach", "alias",
     "_to_copy", "lift_fresh_copy", "mul", "add", "sub", "div", "__mul__", "__add__", "__sub__", "__truediv__",
     "truediv", "neg", "convert_element_type", "cpu", "cuda"}
)  # fmt: skip
_PIECES = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind"})

_Rule = Callable[[fx.Node, View, Sequence[Any], Sequence[Any]], View | None]


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _reversed(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View:
    return replace(view, axes=view.axes[:-2] + view.axes[-2:][::-1])


def _transposed(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    first, second = _argument(node, 1, "dim0"), _argument(node, 2, "dim1")
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    axes = list(view.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return replace(view, axes=tuple(axes))


def _permuted(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    dims = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "dims", ())
    flat = [dim for dim in (dims if isinstance(dims, (list, tuple)) else [dims]) if isinstance(dim, int)]
    return replace(view, axes=tuple(view.axes[dim] for dim in flat)) if len(flat) == len(view.axes) else None


def _resized(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View:
    """Views, reshapes, squeezes and expansions: axes that are one to one keep their name."""
    axes: list[Axis] = []
    position = 0
    for size in shape:
        while position < len(before) and before[position] == 1 and size != 1:
            position += 1
        if size == 1:
            axes.append(Axis())
        elif position < len(before) and before[position] == size:
            axes.append(view.axes[position])
            position += 1
        else:
            break
    tail: list[Axis] = []
    end = len(before)
    for size in reversed(shape[len(axes) :]):
        while end > position and before[end - 1] == 1 and size != 1:
            end -= 1
        if size == 1:
            tail.append(Axis())
        elif end > position and before[end - 1] == size:
            tail.append(view.axes[end - 1])
            end -= 1
        else:
            break
    mixed = len(shape) - len(axes) - len(tail)
    return replace(view, axes=(*axes, *[Axis(is_whole=False)] * mixed, *tail[::-1]))


def _expanded(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View:
    added = len(shape) - len(before)
    kept = [axis if old == new else Axis() for axis, old, new in zip(view.axes, before, shape[added:], strict=True)]
    return replace(view, axes=(*[Axis()] * added, *kept))


def _sliced(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    if len(before) != len(shape):
        return None
    return replace(view, axes=tuple(map(_cut, view.axes, before, shape)))


def _cut(axis: Axis, before: Any, after: Any) -> Axis:
    return axis if before == after else replace(axis, is_whole=False)


def _piece(node: fx.Node, cut: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    if function_name(cut) != "unbind":
        return _sliced(node, view, before, shape)
    dim = _argument(cut, 1, "dim", 0)
    index = node.args[1]
    return _pick(view, dim % len(before), index) if isinstance(index, int) and isinstance(dim, int) else None


def _pick(view: View, position: int, index: int | fx.Node) -> View | None:
    axis = view.axes[position]
    rest = view.axes[:position] + view.axes[position + 1 :]
    if axis.of is None or not axis.is_whole or axis.index is not None:
        return replace(view, axes=rest) if axis == Axis() else None
    return View(rest, (*view.picked, (axis.of, index)))


def _selected(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    dim, index = _argument(node, 1, "dim", 0), _argument(node, 2, "index")
    if not isinstance(dim, int) or not isinstance(index, (int, fx.Node)):
        return None
    position = dim % len(before)
    if isinstance(index, int) and index < 0:
        index += before[position]
    return _pick(view, position, index)


def _gathered(view: View, position: int, index: fx.Node) -> View | None:
    shape, value = shape_of(index), value_of(index)
    axis = view.axes[position]
    if not shape:  # a number, or a tensor of one number
        return _pick(view, position, index)
    if value.is_floating_point() or value.dtype == torch.bool:
        return None
    if axis.of is None or not axis.is_whole or axis.index is not None:
        return None
    slots = tuple(Axis(axis.of, False, index, slot) for slot in range(len(shape)))
    return replace(view, axes=view.axes[:position] + slots + view.axes[position + 1 :])


def _index_selected(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    dim, index = _argument(node, 1, "dim", 0), _argument(node, 2, "index")
    return _gathered(view, dim % len(before), index) if isinstance(index, fx.Node) and isinstance(dim, int) else None


def _indexed(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    """Square brackets, and aten.index with its list of indices: at most one of them a tensor."""
    given = node.args[1]
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    if sum(isinstance(item, fx.Node) for item in items) > 1:
        return None
    if Ellipsis in [item for item in items if not isinstance(item, fx.Node)]:
        place = next(number for number, item in enumerate(items) if item is Ellipsis)
        missing = len(before) - sum(item is not None for item in items) + 1
        items[place : place + 1] = [slice(None)] * missing
    is_aten = function_name(node) == "index"
    found: View | None = view
    position = 0
    sizes = list(before)
    for item in items:
        if found is None:
            return None
        if item is None and not is_aten:
            found = replace(found, axes=(*found.axes[:position], Axis(), *found.axes[position:]))
            sizes.insert(position, 1)
            position += 1
        elif isinstance(item, int) and not isinstance(item, bool):
            found = _pick(found, position, item % sizes.pop(position) if isinstance(sizes[position], int) else item)
        elif isinstance(item, fx.Node):
            wide = shape_of(item)
            found = _gathered(found, position, item)
            sizes[position : position + 1] = list(wide or ())
            position += len(wide or ())
        elif item is None or item == slice(None):
            position += 1
        elif isinstance(item, slice):
            axes = list(found.axes)
            axes[position] = replace(axes[position], is_whole=False)
            found = replace(found, axes=tuple(axes))
            position += 1
        else:
            return None
    return found if found is None or len(found.axes) == len(shape) else None


def _attribute(node: fx.Node, view: View, before: Sequence[Any], shape: Sequence[Any]) -> View | None:
    """x.T and x.mT, which dynamo writes as getattr; x.data."""
    name = node.args[1]
    if name in ("T", "mT", "H", "mH"):
        return _reversed(node, view, before, shape)
    return view if name == "data" else None


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("t", "mT", "T", "adjoint", "H", "mH", "numpy_T", "matrix_H"), _reversed),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "transpose_"), _transposed),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
        _resized,
    ),
    **dict.fromkeys(("slice", "narrow"), _sliced),
    **dict.fromkeys(("getitem", "__getitem__", "index"), _indexed),
    "permute": _permuted,
    "expand": _expanded,
    "expand_as": _expanded,
    "select": _selected,
    "index_select": _index_selected,
    "getattr": _attribute,
    operator.getitem.__name__: _indexed,
}
