"""Weights as kernels want them: each prepared once for all graphs, and then held in that order alone.

A prepared weight is found again by layout and weights. What a merged product holds serves a graph that does not merge,
as views; where such a graph came first, its tensors become views once the merged weight is there.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ptqc import stored_rows
from ptqc.held import AS_STORED, Held, Layout, Order
from ptqc.identity import Mark, WeightTable
from ptqc.qtensor import QuantTensor

__all__ = ["give_up_parts", "prepared_parts"]

_Made = dict[tuple[Layout, tuple[int, ...]], tuple[list[Mark], list[TensorWeakRef]]]

_prepared: WeightTable[_Made] = WeightTable()
"""First weight -> layout and the other weights -> those (their marks, alive as long as this), what was prepared."""


def prepared_parts(layout: Layout, weights: Sequence[QuantTensor]) -> list[Tensor]:
    """Weights of one spec, one below the other, in a layout; from another graph if that, or the weight, holds them."""
    if layout == AS_STORED:
        for weight in weights:
            weight.take_back()
    found = _known(layout, weights) or _shared(layout, weights)
    if found is None:
        first, *_ = weights
        parts = stored_rows.concat([_matrix(weight) for weight in weights], first.spec, first.stored_shape[-1])
        found = layout.prepare(list(parts.values()))
    first, *others = weights
    key = layout, tuple(id(weight.mark) for weight in others)
    references = [TensorWeakRef(tensor) for tensor in found]
    _prepared.setdefault(first, {})[key] = [weight.mark for weight in others], references
    return found


def _matrix(weight: QuantTensor) -> dict[str, Tensor]:
    """The parts of a weight, with the experts of a stack one below the other."""
    return {name: part.flatten(0, -2) if part.ndim > 2 else part for name, part in weight.parts.items()}


def _row_count(weight: QuantTensor) -> int:
    return math.prod(weight.stored_shape[:-1])


def _known(layout: Layout, weights: Sequence[QuantTensor]) -> list[Tensor] | None:
    first, *others = weights
    made = _prepared.get(first, {}).get((layout, tuple(id(weight.mark) for weight in others)))
    if made is None:
        return None
    found = [reference() for reference in made[1]]
    alive = [tensor for tensor in found if tensor is not None]
    return alive if len(alive) == len(found) else None


def _shared(layout: Layout, weights: Sequence[QuantTensor]) -> list[Tensor] | None:
    """What the weights hold already, all in one place, or a piece of what a single one holds with others."""
    held = weights[0].held
    if held is None:
        return None
    if len(weights) == 1:
        return held.order.layout.cut(held.prepared, held.order.first, layout)
    lies = [_place(weight.held) for weight in weights]
    firsts = accumulate(map(_row_count, weights), initial=0)
    wanted = [(layout, first, held.prepared[0].data_ptr()) for first, _ in zip(firsts, weights, strict=False)]
    return list(held.prepared) if lies == wanted else None


def _place(held: Held | None) -> tuple[Layout, int, int] | None:
    return None if held is None else (held.order.layout, held.order.first, held.prepared[0].data_ptr())


def give_up_parts(layout: Layout, weights: Sequence[QuantTensor], prepared: Sequence[Tensor]) -> list[object]:
    """Let weights hold the parts that a layout can give back in it alone.

    Returns memory that has lost its use, to be kept until nothing can run on it any more.
    """
    unused: list[object] = []
    firsts = accumulate(map(_row_count, weights), initial=0)
    for weight, first in zip(weights, firsts, strict=False):
        if weight.held is None and not weight.stays_stored:
            names = _exact(layout, weight, prepared, first)
            if "codes" in names:
                weight.give_up(Held(Order(layout, first, weight.spec, weight.stored_shape, names), tuple(prepared)))
        elif weight.held is not None and weight.held.order.layout != layout:
            unused += _let_share(weight.held, layout, prepared, first)
    return unused


def _exact(layout: Layout, weight: QuantTensor, prepared: Sequence[Tensor], first: int) -> tuple[str, ...]:
    """The parts that come back as they were: codes by construction, others if they do."""
    parts, rows = _matrix(weight), _row_count(weight)
    return tuple(
        name
        for name in layout.restorable
        if name == "codes" or _same_bits(layout.restore(name, prepared, first, rows), parts[name])
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*(part.view(torch.uint8) for part in (a, b)))


def _let_share(held: Held, layout: Layout, prepared: Sequence[Tensor], first: int) -> list[object]:
    """Make the tensors of an earlier graph views of a merged weight that holds the same; return their old memory."""
    views = layout.cut(prepared, first, held.order.layout)
    if views is None or any(old.shape != new.shape for old, new in zip(held.prepared, views, strict=True)):
        return []
    memory: list[object] = []
    for old, new in zip(held.prepared, views, strict=True):
        if old.untyped_storage()._cdata == new.untyped_storage()._cdata:
            continue
        memory.append(old.untyped_storage())
        with torch.inference_mode(old.is_inference()):
            old.set_(new.untyped_storage(), new.storage_offset(), new.shape, new.stride())
    return memory
