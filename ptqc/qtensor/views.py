"""Views of stored weights: transposed, the same, and rows or matrices chosen from them, all without dequantizing."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ptqc import stored_rows
from ptqc.qtensor.rules import rule
from ptqc.qtensor.tensor import QuantTensor
from ptqc.spec import WeightSpec

_aten = torch.ops.aten


@rule(_aten.t.default)
def _t(weight: QuantTensor) -> Any:
    return weight.alias(not weight.is_transposed) if weight.ndim == 2 else NotImplemented


@rule(_aten.transpose.int)
def _transpose(weight: QuantTensor, first: int, second: int) -> Any:
    if {first % weight.ndim, second % weight.ndim} != {weight.ndim - 2, weight.ndim - 1}:
        return NotImplemented
    return weight.alias(not weight.is_transposed)


@rule(_aten.permute.default)
def _permute(weight: QuantTensor, order: Sequence[int]) -> Any:
    order = [axis % weight.ndim for axis in order]
    lead = list(range(weight.ndim - 2))
    if order == [*lead, weight.ndim - 1, weight.ndim - 2]:
        return _transpose(weight, -1, -2)
    return weight.alias() if order == list(range(weight.ndim)) else NotImplemented


@rule(_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
def _view_all(weight: QuantTensor) -> QuantTensor:
    return weight.alias()


@rule(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.expand.default)
def _same_shape(weight: QuantTensor, shape: Sequence[int], **_: Any) -> Any:
    wanted = [old if new == -1 else new for old, new in zip(weight.shape, shape, strict=False)]
    is_same = tuple(wanted) == weight.shape and len(shape) == weight.ndim
    return weight.alias() if is_same else NotImplemented


def _taken(weight: QuantTensor, dim: int, index: Any) -> Any:
    """Index a stored weight along `dim` of its stored shape."""
    if weight.is_transposed and dim % weight.ndim >= weight.ndim - 2:
        return NotImplemented
    dim %= weight.ndim
    if dim >= weight.ndim - 2 and weight.surroundings.output_rotation is not None:
        return NotImplemented
    taken = _parts_at(weight, dim, index)
    if taken is None:
        return NotImplemented
    parts, spec = taken
    extras = {name: _aten.alias.default(extra) for name, extra in weight.extras.items()}
    if weight.surroundings.order and dim < weight.ndim - 2:
        extras["order"] = stored_rows.index(weight.extras["order"], dim, index)
    shape = (*parts["codes"].shape[:-1], weight.stored_shape[-1])
    return weight.with_parts(parts, spec=spec, stored_shape=shape, extras=extras)


def _parts_at(weight: QuantTensor, dim: int, index: Any) -> tuple[dict[str, Tensor], WeightSpec] | None:
    """Parts and spec of what is taken; of parts that were given up, a slice of rows is made anew alone."""
    rows = _range(index, weight.stored_shape[0]) if weight.given_up and dim == 0 else None
    if not rows:
        return stored_rows.take(weight.parts, weight.spec, weight.stored_shape, dim, index)
    taken = stored_rows.take(weight.slots, weight.spec, weight.stored_shape, dim, index)
    if taken is None:
        return None
    parts, spec = taken
    restored = {name: weight.restored(name, rows.start, len(rows)) for name in weight.given_up}
    return parts | {name: part[0] if isinstance(index, int) else part for name, part in restored.items()}, spec


def _range(index: Any, size: int) -> range | None:
    """The rows of a slice without steps, or the row of a number; None if it is something else, or not known while a
    graph is traced."""
    if isinstance(index, int):
        return range(index % size, index % size + 1)
    if not isinstance(index, slice) or not all(isinstance(end, int | None) for end in (index.start, index.stop)):
        return None
    return range(*index.indices(size)) if index.step in (None, 1) else None


@rule(_aten.select.int)
def _select(weight: QuantTensor, dim: int, index: int) -> Any:
    return _taken(weight, dim, index) if weight.ndim > 2 and dim % weight.ndim < weight.ndim - 2 else NotImplemented


@rule(_aten.slice.Tensor)
def _slice(weight: QuantTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    size = weight.shape[dim]
    if (start or 0) == 0 and (end is None or end >= size) and step == 1:
        return weight.alias()
    return _taken(weight, dim, slice(start, end, step))


@rule(_aten.split.Tensor)
def _split(weight: QuantTensor, size: int, dim: int = 0) -> Any:
    return _split_with_sizes(
        weight, [min(size, weight.shape[dim] - at) for at in range(0, weight.shape[dim], size)], dim
    )


@rule(_aten.split_with_sizes.default)
def _split_with_sizes(weight: QuantTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    pieces = [_taken(weight, dim, slice(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else pieces


@rule(_aten.unbind.int)
def _unbind(weight: QuantTensor, dim: int = 0) -> Any:
    if weight.ndim < 3 or dim % weight.ndim != 0:
        return NotImplemented
    return tuple(_taken(weight, 0, index) for index in range(weight.shape[0]))


@rule(_aten.index.Tensor)
def _index(weight: Any, indices: Sequence[Tensor | None]) -> Any:
    if not isinstance(weight, QuantTensor) or weight.ndim < 3 or len(indices) != 1:
        return NotImplemented
    index = indices[0]
    return NotImplemented if index is None or index.ndim != 1 or weight.ndim != 3 else _taken(weight, 0, index)


@rule(_aten.index_select.default)
def _index_select(weight: QuantTensor, dim: int, index: Tensor) -> Any:
    return _taken(weight, dim, index)
