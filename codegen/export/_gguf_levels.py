"""Levels of codes, and numbers as files hold them: rounding that is the same in NumPy and in C++."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptqc.spec import WeightSpec

__all__ = ["HALF_MAX", "TINY", "Levels", "half", "inverse", "whole"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HALF_MAX = np.float32(65504)
TINY = np.float32(2**-120)
_ROUND = np.float32(1.5 * 2**23)
"""No fractions are left of what is added to it: that rounds to integers."""


@dataclass(frozen=True)
class Levels:
    """Integers low..high, or a table of integers (whose neighbours are at least 1 apart); code = place in order."""

    low: int
    high: int
    table: tuple[int, ...] = ()

    @staticmethod
    def of(spec: WeightSpec) -> "Levels":
        """The levels of a spec's codes."""
        if spec.book is None:
            low = -(2 ** (spec.bits - 1)) if spec.is_symmetric else 0
            return Levels(low, low + 2**spec.bits - 1)
        table = tuple(int(level) for level in spec.book.levels)
        is_plain = table == tuple(range(table[0], table[0] + len(table)))
        return Levels(table[0], table[-1], () if is_plain else table)

    def nearest(self, values: Floats) -> Floats:
        """Round to levels, in place."""
        if not self.table:
            return whole(values, self.low, self.high)
        return np.take(self.places[1], self._place(values), out=values)

    def codes(self, values: Floats) -> Bytes:
        """Codes of the nearest levels; `values` are used up."""
        if not self.table:
            levels = self.nearest(values)
            levels -= np.float32(self.low)
            return levels.astype(np.uint8)
        return self.places[0][self._place(values)]

    def _place(self, values: Floats) -> NDArray[np.intp]:
        """Half steps from the lowest level: midpoints between integers are edges of these."""
        values -= np.float32(self.low)
        values *= np.float32(2)
        np.clip(values, np.float32(0), np.float32(2 * (self.high - self.low)), out=values)
        return values.astype(np.intp)

    @property
    def places(self) -> tuple[Bytes, Floats]:
        """Code and level by half steps from the lowest level."""
        table = np.array(self.table, np.float32)
        middles = self.low + np.arange(2 * (self.high - self.low) + 1, dtype=np.float32) / 2 + np.float32(0.25)
        codes = np.abs(middles[:, None] - table).argmin(1).astype(np.uint8)
        return codes, table[codes]


def whole(values: Floats, low: int, high: int) -> Floats:
    """The nearest integers low..high, in place; zero without a sign. Ties go to even."""
    np.clip(values, np.float32(low), np.float32(high), out=values)
    values += _ROUND
    values -= _ROUND
    return values


def half(values: Floats) -> Floats:
    """Rounded to float16; zero without a sign."""
    return np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32) + np.float32(0)


def inverse(values: Floats) -> Floats:
    """1 / values; 0 for 0 and numbers whose inverse is no float32."""
    return np.divide(1, values, out=np.zeros_like(values), where=np.abs(values) > TINY)
