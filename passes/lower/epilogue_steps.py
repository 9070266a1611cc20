"""The step behind a value in a graph, read as a fusion (`ptqc.fusions`): the rules of fuse-epilogue."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ptqc.fusions import ACTIVATIONS, narrows
from ptqc.program import value_of
from ptqc.requests import KernelRequest
from ptqc.views import function_name

__all__ = ["Following", "activation_of", "extended", "following", "is_nothing", "same_shape"]


@dataclass(frozen=True)
class Following:
    """result: the node that holds the value behind the step. fusion: its name, None if it changes no number. operand:
    what it takes."""

    result: fx.Node
    fusion: str | None
    operand: fx.Node | float | None = None


def extended(request: KernelRequest, fusion: str) -> KernelRequest:
    """The request with one more step behind the product; relu2 takes the place of the relu before it."""
    before = request.epilogue[:-1] if fusion == "relu2" else request.epilogue
    return replace(request, epilogue=(*before, fusion))


def following(value: fx.Node, request: KernelRequest) -> Following | None:
    """The step that alone reads `value`, if it is one that kernels know."""
    gate = _gate(value, request)
    if gate is not None:
        return gate
    if len(value.users) != 1:
        return None
    (user,) = value.users
    if not isinstance(value_of(user), Tensor):
        return None
    if is_nothing(user, value) or _is_wider(user, value, request):
        return Following(user, None)
    if request.epilogue[-1:] == ("relu",) and _is_square(user, value):
        return Following(user, "relu2")
    activation = activation_of(user)
    if activation is not None:
        return Following(user, activation)
    read = _ARITHMETIC.get(function_name(user))
    return None if read is None or user.kwargs else _arithmetic(user, value, read)


def is_nothing(node: fx.Node, value: fx.Node) -> bool:
    """Rule 5: a node that gives `value` back."""
    name = function_name(node)
    if not node.args or node.args[0] is not value:
        return False
    if name == "dropout":
        arguments: dict[int | str, Any] = dict(enumerate(node.args)) | dict(node.kwargs)
        return not arguments.get(2, arguments.get("training", True)) or arguments.get(1, arguments.get("p", 0.5)) == 0
    if name == "contiguous":
        return not node.kwargs
    return name in _CASTS and _dtype(node) == _dtype(value) and value_of(node).device == value_of(value).device


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = value_of(node).dtype
    return dtype


_CASTS = frozenset({"to", "float", "half", "bfloat16", "type_as", "type"})
_WIDE = (torch.float32, torch.float64)


def _is_wider(node: fx.Node, value: fx.Node, request: KernelRequest) -> bool:
    """Rule 6: a cast upwards, or back to the dtype of the product."""
    if function_name(node) not in _CASTS or node.args[0] is not value:
        return False
    before, after = _dtype(value), _dtype(node)
    if value_of(node).device != value_of(value).device:
        return False
    return after == request.dtype or (after in _WIDE and before.is_floating_point)


def _is_square(node: fx.Node, value: fx.Node) -> bool:
    name = function_name(node)
    power: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent")
    return name == "square" or (name == "pow" and power == 2) or (name == "mul" and node.args == (value, value))


def activation_of(node: fx.Node) -> str | None:
    """The name of the activation that a node applies to its only argument, None if it is none we know."""
    name, options = function_name(node), {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(options.get("approximate", "none")))
    if name not in ACTIVATIONS or options or len(node.all_input_nodes) != 1:
        return None
    return name


_ARITHMETIC: Mapping[str, tuple[str, str]] = {
    "add": ("bias", "add"),
    "__add__": ("bias", "add"),
    "iadd": ("bias", "add"),
    "add_": ("bias", "add"),
    "mul": ("scale", "mul"),
    "__mul__": ("scale", "mul"),
    "imul": ("scale", "mul"),
    "mul_": ("scale", "mul"),
}
"""Function -> the fusion for a vector, and for a matrix."""


def _arithmetic(user: fx.Node, value: fx.Node, names: tuple[str, str]) -> Following | None:
    """Rules 1 and 2."""
    if len(user.args) != 2 or user.args[0] is user.args[1]:
        return None
    other = user.args[1] if user.args[0] is value else user.args[0]
    is_changed = function_name(user) in ("iadd", "imul", "add_", "mul_") and user.args[0] is not value
    if is_changed or value_of(user).dtype != value_of(value).dtype:
        return None
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return Following(user, names[0], float(other))
    seen, shape = value_of(other) if isinstance(other, fx.Node) else None, value_of(value).shape
    if not isinstance(other, fx.Node) or not isinstance(seen, Tensor) or seen.dtype != value_of(value).dtype:
        return None
    if seen.ndim == 1 and statically_known_true(seen.shape[0] == shape[-1]):
        return Following(user, names[0], other)
    return Following(user, names[1], other) if same_shape(seen, value_of(value)) else None


def same_shape(a: Tensor, b: Tensor) -> bool:
    """True if two values have one shape whatever the sizes that are not known yet."""
    return a.ndim == b.ndim and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


# -------------------------------------------------------------------- gates


def _gate(value: fx.Node, request: KernelRequest) -> Following | None:
    """Rule 4."""
    halves = _halves(value, request.width)
    if halves is None or any(map(narrows, request.epilogue)):
        return None
    first, second = halves
    if len(first.users) != 1 or len(second.users) != 1:
        return None
    (activated,), (product,) = first.users, second.users
    activation = activation_of(activated)
    if activation is None or set(activated.users) != {product} or function_name(product) not in ("mul", "__mul__"):
        return None
    return Following(product, f"gate_{activation}") if {*product.args} == {activated, second} else None


def _halves(value: fx.Node, width: int) -> tuple[fx.Node, fx.Node] | None:
    """The nodes that are the first and the second half of the features of `value`, if these are all that read it."""
    if width % 2:
        return None
    pieces: dict[int, fx.Node] = {}
    users = list(value.users)
    if len(users) == 1 and function_name(users[0]) in ("chunk", "split"):
        if not _is_in_two(users[0], width):
            return None
        for piece in users[0].users:
            if function_name(piece) == "getitem" and piece.args[1] in (0, 1):
                pieces[width // 2 if piece.args[1] else 0] = piece
        users = list(users[0].users)
    else:
        for piece in users:
            cut = _slice(piece, width)
            if cut is not None and cut[1] - cut[0] == width // 2:
                pieces[cut[0]] = piece
    return (pieces[0], pieces[width // 2]) if len(users) == 2 and set(pieces) == {0, width // 2} else None


def _is_in_two(node: fx.Node, width: int) -> bool:
    arguments: dict[int | str, Any] = dict(enumerate(node.args)) | dict(node.kwargs)
    into = {"chunk": ("chunks", (2,)), "split": ("split_size_or_sections", (width // 2, (width // 2, width // 2)))}
    key, sizes = into[function_name(node)]
    size = arguments.get(1, arguments.get(key, arguments.get("split_size")))
    size = tuple(size) if isinstance(size, (list, tuple)) else size
    axis = arguments.get(2, arguments.get("dim", 0))
    return size in sizes and axis in (-1, value_of(node.args[0]).ndim - 1)  # type: ignore[arg-type]


def _slice(node: fx.Node, width: int) -> tuple[int, int] | None:
    """(start, stop) if a node is `value[..., start:stop]`, the last axis of `value` being `width` long."""
    if function_name(node) != "getitem" or not isinstance(node.args[1], tuple) or not node.args[1]:
        return None
    *before, last = node.args[1]
    whole = all(part is Ellipsis or part == slice(None) for part in before)
    is_last = Ellipsis in before or len(before) + 1 == value_of(node.args[0]).ndim  # type: ignore[arg-type]
    if not whole or not is_last or not isinstance(last, slice):
        return None
    start, stop, step = last.start or 0, width if last.stop is None else last.stop, last.step or 1
    if not all(isinstance(number, int) for number in (start, stop, step)) or step != 1 or start < 0 or stop > width:
        return None
    return start, stop
