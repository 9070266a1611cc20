"""Which rows of an input value belong to which expert of a stack.

none      a matrix: every row
each      the experts are an axis of the value, or each of them reads every row
given     an index chose the experts: by number, or with a number for every row
offsets   rows are sorted by expert, and it is known where each expert's rows end
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How an input value is read.

    input_axis: its contracted axis. experts: size of the stack, None for a matrix. slots: for "each" and "given", the
    axis of the value (negative) that each axis of the index is, None for an index axis that the value lacks.
    """

    input_axis: int = -1
    kind: Literal["none", "each", "given", "offsets"] = "none"
    experts: int | None = None
    slots: tuple[int | None, ...] = ()

    def rows(self, x: Tensor, index: Tensor | int | None) -> tuple[Tensor, Tensor | None]:
        """The value as rows [..., in], and the expert of each row [...] int64, None for a matrix."""
        rows = x.movedim(self.input_axis, -1)
        if self.experts is None:
            return rows, None
        if self.kind == "offsets":
            ends = torch.as_tensor(index, device=x.device)
            places = torch.arange(len(rows), device=x.device, dtype=ends.dtype)
            return rows, torch.searchsorted(ends, places, right=True)
        if self.kind == "each":
            numbers = torch.arange(self.experts, device=x.device)
        else:
            numbers = torch.as_tensor(index, device=x.device)
        return self._spread(rows, torch.where(numbers < 0, numbers + self.experts, numbers), x.ndim)

    def _spread(self, rows: Tensor, numbers: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Give every row its number; rows are repeated for the index axes that the value lacks."""
        missing = [size for size, slot in zip(numbers.shape, self.slots, strict=True) if slot is None]
        lead = rows.shape[:-1]
        wide = rows.view(*lead, *[1] * len(missing), rows.shape[-1]) if missing else rows
        wide = wide.expand(*lead, *missing, rows.shape[-1]) if missing else wide
        target = [self._place(slot, ndim) for slot in self.slots if slot is not None]
        order = [n for n, slot in enumerate(self.slots) if slot is not None]
        order.sort(key=lambda n: self._place(self.slots[n], ndim))
        order += [n for n, slot in enumerate(self.slots) if slot is None]
        shape = [1] * len(lead) + missing
        for place in target:
            shape[place] = lead[place]
        return wide, numbers.permute(order).reshape(shape).expand(wide.shape[:-1])

    def _place(self, slot: int | None, ndim: int) -> int:
        """Where an axis of the value stands among its rows' axes."""
        place = (slot or 0) % ndim
        return place - 1 if place > self.input_axis % ndim else place
