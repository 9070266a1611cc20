"""Under which names the parameters of a transformers model lie in folders, and which piece of one each tensor is.

transformers packs experts, and renames, while it loads, and undoes both when it saves. What that does to a model is
found by doing it: every row of every parameter is labelled with a number, the labels go through transformers' own
conversions, and the labels of a result tell which rows of which parameter it is.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqc import stored_rows
from ptqc.errors import first_line
from ptqc.qtensor import QuantTensor

__all__ = ["Piece", "stacked", "stored_names"]

log = logging.getLogger("ptqc")


@dataclass(frozen=True)
class Piece:
    """What a tensor of a folder is of a parameter.

    name: of the parameter. index: along its first axis, None for all of it. rows: of that, None for all.
    """

    name: str
    index: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The piece, a QuantTensor if the parameter is one whose spec can be cut."""
        taken = parameter if self.index is None else parameter[self.index]
        return taken if self.rows is None else taken[self.rows[0] : self.rows[1]]


def stored_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Piece]:
    """The piece that lies under each name in a folder.

    model: a transformers model, perhaps without values; any other module has its own names. state: its tensors, tied
    ones once; only their shapes are looked at. Where transformers' conversions do more than cut and rename, parameters
    keep their own names, and the log says so.
    """
    own = {name: Piece(name) for name in state}
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        return own
    try:
        return _converted(model, state)
    except Exception as error:  # conversions of other architectures may do anything to the labels
        log.warning("parameters keep the names of the model: transformers' conversions cannot be followed (%s)",
                    first_line(error))  # fmt: skip
        return own


def _converted(model: Any, state: Mapping[str, Tensor]) -> dict[str, Piece]:
    from transformers.core_model_loading import revert_weight_conversion

    labels, starts, names, start = {}, [], [], 0
    for name, tensor in state.items():
        rows = math.prod(tensor.shape[:-1])
        labels[name] = torch.arange(start, start + rows).view(*tensor.shape[:-1], *[1] * (tensor.ndim > 0))
        starts.append(start)
        names.append(name)
        start += rows
    with _with_its_conversions(model):
        found = revert_weight_conversion(model, labels)
    pieces = {}
    for stored, label in found.items():
        flat = label.reshape(-1)
        place = bisect_right(starts, int(flat[0])) - 1
        pieces[stored] = _piece(names[place], flat - starts[place], state[names[place]].shape)
    if {piece.name for piece in pieces.values()} != set(state):
        raise ValueError("a parameter is lost")
    return pieces


@contextmanager
def _with_its_conversions(model: Any) -> Iterator[None]:
    """A model that ptqc loaded has an empty list of conversions, since our folders have none: look them up anew."""
    known = model.__dict__.get("_weight_conversions")
    if known == []:
        del model._weight_conversions
    try:
        yield
    finally:
        if known == []:
            model._weight_conversions = known


def _piece(name: str, rows: Tensor, shape: torch.Size) -> Piece:
    """rows: labels of the piece, counted from the first row of the parameter of this shape."""
    first, count = int(rows[0]), rows.numel()
    if not torch.equal(rows, torch.arange(first, first + count)):
        raise ValueError(f"{name} is not cut by rows")
    if count == math.prod(shape[:-1]):
        return Piece(name)
    if len(shape) == 2:
        return Piece(name, None, (first, first + count))
    out_features = math.prod(shape[1:-1])
    index, row = divmod(first, out_features)
    if len(shape) != 3 or row + count > out_features:
        raise ValueError(f"{name} is not cut into matrices")
    return Piece(name, index, None if count == out_features else (row, row + count))


def stacked(pieces: Sequence[QuantTensor], shape: Sequence[int]) -> QuantTensor | None:
    """One weight of pieces [out_k, in] that lie one below the other; None if they are not stored alike.

    shape: of the weight, [..., out, in]. Scales shared by rows, nested scales and different orders of inputs within one
    matrix of the stack cannot be put together.
    """
    first = pieces[0] if pieces else None
    if first is None or first.spec.rows != 1 or first.spec.scale.bits is not None:
        return None
    if any((piece.spec, piece.surroundings) != (first.spec, first.surroundings) for piece in pieces):
        return None
    parts = stored_rows.concat([piece.parts for piece in pieces], first.spec, shape[-1])
    lead, rows = tuple(shape[:-2]), [piece.shape[0] for piece in pieces]
    extras = {}
    for name in first.extras:
        values = torch.stack([piece.extras[name] for piece in pieces])
        if name == "order":
            by_row = values.repeat_interleave(torch.tensor(rows), 0).view(*shape[:-1], -1)
            if not bool((by_row == by_row[..., :1, :]).all()):
                return None
            extras[name] = by_row[..., 0, :].contiguous()
        elif bool((values == values[0]).all()):
            extras[name] = values[0]
        else:
            return None
    stored = {name: part.view(*lead, shape[-2], part.shape[-1]) for name, part in parts.items()}
    return first.with_parts(stored, stored_shape=tuple(shape), extras=extras)
