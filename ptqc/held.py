"""Parts of a weight that lie in memory only in the order in which a kernel reads them.

A kernel wants codes in an order of its own, made once (`Layout.prepare`). To keep the stored parts beside that would
hold every weight twice, so a weight gives up the parts that can be had back exactly, and `restore` makes them again
for whoever asks (`QuantTensor.parts`). Several weights may lie in one prepared weight, one below the other.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ptqc import storage
from ptqc.errors import PtqcError
from ptqc.spec import WeightSpec

__all__ = ["AS_STORED", "Held", "Layout", "OneWay", "Order", "order_called"]


class Layout(Protocol):
    """How a kernel holds a weight [out, in]. A value: equal layouts make equal tensors of equal parts."""

    @property
    def restorable(self) -> tuple[str, ...]:
        """The parts that `restore` knows: codes are exact always, others where `prepare` has rounded nothing away."""
        ...

    @property
    def prepare(self) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """From the stored parts to what the kernel reads."""
        ...

    def restore(self, name: str, prepared: Sequence[Tensor], first: int, rows: int) -> Tensor:
        """The part of rows [first, first + rows), in memory of its own."""
        ...

    def cut(self, prepared: Sequence[Tensor], first: int, piece: "Layout") -> list[Tensor] | None:
        """What `piece` would hold of the rows from `first` on, as views; None if that is no view."""
        ...

    def stacked(self, count: int) -> "Layout | None":
        """The layout of `count` such weights one below the other, of which `cut` gives each; None if there is none."""
        ...


@dataclass(frozen=True)
class OneWay:
    """A layout that gives nothing back."""

    prepare: Callable[[Sequence[Tensor]], list[Tensor]]
    restorable: tuple[str, ...] = ()

    def restore(self, name: str, prepared: Sequence[Tensor], first: int, rows: int) -> Tensor:
        """Nobody may ask."""
        raise AssertionError(f"{name} cannot be restored")

    def cut(self, prepared: Sequence[Tensor], first: int, piece: Layout) -> list[Tensor] | None:
        """A weight that is the same."""
        return list(prepared) if piece == self and first == 0 else None

    def stacked(self, count: int) -> Layout | None:
        """None: what it makes of several weights is not known to have those of each in it."""
        return None


AS_STORED = OneWay(list)
"""What reads the stored parts themselves."""


@dataclass(frozen=True)
class Order:
    """Where a weight [..., out, in] lies: from row `first` on of what `layout` prepared. names: of parts given up."""

    layout: Layout
    first: int
    spec: WeightSpec
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @cached_property
    def called(self) -> str:
        """A short name, the same in every process: what graphs call it."""
        name = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        _orders[name] = self
        return name

    def restore(self, name: str, prepared: Sequence[Tensor]) -> Tensor:
        """A part that was given up."""
        part = self.layout.restore(name, prepared, self.first, math.prod(self.shape[:-1]))
        return part.view(self.part_layout[name][0])

    def of_rows(self, first: int, rows: int | None) -> "Order":
        """Where `rows` of its rows (or experts) from `first` on lie; None: all of them that follow."""
        count = self.shape[0] - first if rows is None else rows
        each = math.prod(self.shape[1:-1])
        return replace(self, first=self.first + first * each, shape=(count, *self.shape[1:]))

    @property
    def part_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every part of the weight."""
        return storage.part_layout(self.spec, self.shape)


_orders: dict[str, Order] = {}


def order_called(name: str) -> Order:
    """The order of a name that this process has seen.

    Raises: PtqcError for a program that was exported from a compiled model and loaded elsewhere.
    """
    if name not in _orders:
        raise PtqcError(
            f"this graph reads a weight as a kernel holds it (order {name}), which this process does not know; export "
            'the model before it is compiled, or compile it with options={"keep_stored": True}'
        )
    return _orders[name]


@dataclass(frozen=True, eq=False)
class Held:
    """The tensors of a prepared weight, and where in them a weight lies."""

    order: Order
    prepared: tuple[Tensor, ...]
