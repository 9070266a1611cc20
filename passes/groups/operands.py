"""Operands: values that derive from one parameter alone, and where each of their elements came from.

Views, casts, gathers and constant factors are followed by pushing one index tensor per axis of the parameter through
them; nothing is read from the parameter itself, so that models on the meta device do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.passes.groups.labels import along, compact, largest, shrunk
from ptqc.passes.groups.moves import (
    KEEPS,
    KNOWN_FAILURES,
    MOVES,
    TAKES,
    is_symbolic,
    looked_up,
    moved,
    operator_name,
    shape_of,
    taken,
    taken_axes,
)
from ptqc.program import Program, value_of

__all__ = ["Facts", "Key", "Operand", "facts", "parameter_key"]

Key = tuple[int, int, tuple[int, ...]]
"""What identifies a parameter: its memory, where in it, and its shape."""


@dataclass(frozen=True, eq=False)
class Operand:
    """A node whose value is factor * (a rearrangement of (parameter + offset)).

    source: the placeholder. key: the parameter, the same in every graph. maps: for each axis of the parameter, the
    index along it of every element, int32 in the node's shape; None where the data decides. factor: None if it is a
    tensor.
    """

    node: fx.Node
    source: fx.Node
    key: Key
    maps: tuple[Tensor | None, ...]
    offset: float = 0.0
    factor: float | None = 1.0

    def pulled_back(self, labels: Tensor) -> tuple[int, Tensor] | None:
        """The axis of the parameter, and the label of every index along it, that give its elements these labels.

        labels: broadcastable to the node's shape. Returns (negative axis, [size] int32; -1 where nothing is said), or
        None if no single axis does.
        """
        small = shrunk(labels).clamp(min=-1)
        rank = len(self.maps)
        for axis in range(rank - 1, -1, -1):
            found = self._along(axis, small)
            if found is not None:
                return axis - rank, found
        return None

    def _along(self, axis: int, small: Tensor) -> Tensor | None:
        index = self.maps[axis]
        if index is None:
            return None
        index = compact(index)
        if any(small.shape[at] > 1 and index.shape[at] == 1 for at in range(index.ndim)):
            return None
        wanted = small.expand(index.shape)
        size = shape_of(self.source)[axis]
        channel = torch.full((size,), -3, dtype=torch.int32)
        channel.scatter_reduce_(0, index.flatten().long(), wanted.flatten(), "amax")
        agrees = bool((channel[index.long()] == wanted).all())
        return channel.clamp(min=-1) if agrees else None

    def axes_along(self, axis: int) -> list[int]:
        """The axes of the parameter (negative) whose index changes along an axis of the node."""
        rank = len(self.maps)
        return [at - rank for at, index in enumerate(self.maps) if index is not None and shrunk(index).shape[axis] > 1]


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a program before anything is scaled.

    order: position of every node. operands: nodes that derive from one parameter. keys: placeholder -> parameter.
    zeros: nodes whose elements are all exactly zero. constants: integers that depend on nothing.
    """

    program: Program
    order: Mapping[fx.Node, int]
    operands: Mapping[fx.Node, Operand]
    keys: Mapping[fx.Node, Key]
    zeros: frozenset[fx.Node]
    constants: Mapping[fx.Node, Tensor]


def parameter_key(parameter: Tensor) -> Key:
    """What identifies a parameter in every graph: its memory, since tied parameters may be two objects."""
    return parameter.untyped_storage()._cdata, int(parameter.storage_offset()), tuple(parameter.shape)


def facts(program: Program) -> Facts:
    """Gather what is known of a program."""
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    keys = {node: parameter_key(value) for node, value in program.parameters.items()}
    operands: dict[fx.Node, Operand] = {}
    for node, key in keys.items():
        shape = shape_of(node)
        maps = tuple(along(torch.arange(size, dtype=torch.int32), at, shape) for at, size in enumerate(shape))
        operands[node] = Operand(node, node, key, maps)
    zeros: set[fx.Node] = set()
    constants = _constants(program)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            derived = _derived(node, operands, constants)
        except KNOWN_FAILURES:  # a form of an operator that is not known: not an operand
            derived = None
        if derived is not None:
            operands[node] = derived
        if _is_zero(node, zeros):
            zeros.add(node)
    return Facts(program, order, operands, keys, frozenset(zeros), constants)


_COMPUTED = KEEPS | MOVES | {"_to_copy", "add", "arange", "mul", "sub"}
_LARGEST_CONSTANT = 1 << 20


def _constants(program: Program) -> dict[fx.Node, Tensor]:
    """Integer constants of a graph (indices that the model's code spells out), computed."""
    found: dict[fx.Node, Tensor] = {}
    for node in program.graph.nodes:
        value = getattr(program.module, str(node.target), None) if node.op == "get_attr" else value_of(node)
        if not isinstance(value, Tensor) or value.is_floating_point() or value.numel() > _LARGEST_CONSTANT:
            continue
        if node.op == "get_attr" and type(value) is Tensor:
            found[node] = value
        elif operator_name(node) in _COMPUTED and all(source in found for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: found[source])
            found[node] = node.target(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
    return found


def _derived(node: fx.Node, operands: Mapping[fx.Node, Operand], constants: Mapping[fx.Node, Tensor]) -> Operand | None:
    name = operator_name(node)
    value = value_of(node)
    if is_symbolic(node):
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point() or not node.args:
        return _chunk(node, operands)
    base = next((operands[arg] for arg in node.args if isinstance(arg, fx.Node) and arg in operands), None)
    if base is None:
        return None
    if name in ("add", "sub", "rsub", "mul", "div", "neg"):
        return _arithmetic(name, node, base)
    if base.node is not node.args[0]:
        return None
    if name == "_to_copy" or name in KEEPS:
        return _with(base, node, base.maps)
    others = [source for source in node.all_input_nodes if source is not base.node]
    if name in TAKES:
        return _with(base, node, tuple(_taken_map(node, index, constants) for index in base.maps))
    if name in MOVES and name != "constant_pad_nd" and not others:
        return _with(base, node, tuple(None if index is None else moved(node, index, 0) for index in base.maps))
    return None


def _chunk(node: fx.Node, operands: Mapping[fx.Node, Operand]) -> Operand | None:
    """An item of a split."""
    if operator_name(node) != "getitem":
        return None
    split, at = node.args[0], node.args[1]
    if not isinstance(split, fx.Node) or operator_name(split) not in MOVES or split.args[0] not in operands:
        return None
    base = operands[split.args[0]]  # type: ignore[index]
    maps = tuple(None if index is None else moved(split, index, 0)[at] for index in base.maps)
    return _with(base, node, maps)


def _with(base: Operand, node: fx.Node, maps: tuple[Tensor | None, ...]) -> Operand:
    return Operand(node, base.source, base.key, maps, base.offset, base.factor)


def _taken_map(node: fx.Node, index: Tensor | None, constants: Mapping[fx.Node, Tensor]) -> Tensor | None:
    if index is None:
        return None
    exact = looked_up(node, index, constants)
    if exact is not None:
        return exact
    for axis in taken_axes(node):
        top, differing = largest(index, axis)
        if differing.numel():
            return None
        index = top.expand([size if at != axis + index.ndim else 1 for at, size in enumerate(index.shape)])
    return taken(node, index)


def _arithmetic(name: str, node: fx.Node, base: Operand) -> Operand | None:
    """factor * (w + offset) with a number added or multiplied. 1 - w is read as -(w - 1)."""
    if name == "neg":
        factor = None if base.factor is None else -base.factor
        return Operand(node, base.source, base.key, base.maps, base.offset, factor)
    other: Any = node.args[1] if node.args[0] is base.node else node.args[0]
    if isinstance(other, fx.Node) or node.kwargs or len(node.args) > 2 or base.factor is None:
        return None
    number, is_first = float(other), node.args[0] is base.node
    if name in ("div", "sub") and not is_first:
        return None
    if name in ("mul", "div"):
        factor = base.factor * number if name == "mul" else base.factor / number
        return None if factor == 0 else Operand(node, base.source, base.key, base.maps, base.offset, factor)
    if name == "rsub":
        return Operand(node, base.source, base.key, base.maps, base.offset - number / base.factor, -base.factor)
    shift = number if name == "add" else -number
    return Operand(node, base.source, base.key, base.maps, base.offset + shift / base.factor, base.factor)


_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_FULLS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    name = operator_name(node)
    if name in _ZEROS:
        return True
    if name in _FULLS:
        filled: Any = node.args[_FULLS[name]]
        return not isinstance(filled, fx.Node) and filled == 0
    return (name == "_to_copy" or (name in MOVES and name != "constant_pad_nd")) and node.args[0] in zeros
