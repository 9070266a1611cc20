"""Scales of plain blocks of 32 without importance, in small integers: as good as `_gguf_search`, several times faster.

The weights of a block become 15-bit integers u between its ends. Candidates put them on levels l by one product and a
shift of 16-bit integers; the sums that say how good a candidate is are exact, whatever their order:

    l = clip((round(u * factor / 2^15) + bias) >> FRACTION)        levels in units of 2^-FRACTION
    sum(l * u), sum(l * l), sum(l)

The best scale and minimum for the best candidate are stored as float16, and levels are chosen for them once more.
There are no turns: another candidate lowers the error as much, in less time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptqc.codegen.export._gguf_layouts import Fields
from ptqc.codegen.export._gguf_levels import Levels, half, inverse, whole
from ptqc.codegen.export._gguf_search import Search, Sums, best_of, solve

__all__ = ["LARGEST_BIAS", "LARGEST_FACTOR", "UNITS", "QuickSearch"]

Floats = NDArray[np.float32]
Shorts = NDArray[np.int16]

UNITS, LARGEST_FACTOR, LARGEST_BIAS = 32767, 24000, 8000
"""The first lie between zero and the largest magnitude, or lowest and highest weight. The sum of the others fits
16 bits: blocks that would need more lose some levels at an end."""


@dataclass(frozen=True)
class QuickSearch:
    """A search without importance over the candidates of `search`, whose groups are whole blocks."""

    search: Search

    @property
    def fraction(self) -> int:
        """Bits of a level behind the point: factors of candidates are about 2^14."""
        return 14 - self.search.spec.bits

    @property
    def candidates(self) -> tuple[tuple[int, int], ...]:
        """Factor and bias of every candidate."""
        one = 1 << self.fraction
        pairs = ((float(stretch), float(shift)) for stretch, shift in self.search.candidates)
        return tuple((round(stretch * one), one // 2 - round(shift * one)) for stretch, shift in pairs)

    def run(self, weights: Floats) -> Fields:
        """Encode rows [rows, columns] of whole blocks."""
        w = np.ascontiguousarray(weights.reshape(-1, self.search.spec.group or 1).T)  # [weight, block]
        low, span = self._ends(w)
        units = w - low if self.has_minimum else w
        u = whole(units * inverse(span) * np.float32(UNITS), -UNITS, UNITS).astype(np.int16)
        fit = solve(best_of(self._candidates(u), is_nested=False), is_nested=False)
        step = span * np.float32(1 / UNITS)
        scale = half(fit.scale * step)
        offset = half(low - fit.minimum * step) if fit.minimum is not None else low
        codes = self._levels(u, *self._placed(scale, offset, low, step)) - Levels.of(self.search.spec).low
        floats = [scale, offset] if self.has_minimum else [scale]
        return Fields(
            np.ascontiguousarray(codes.T).astype(np.uint8),
            np.stack(floats, axis=1).astype(np.float16), np.empty((w.shape[1], 0), np.uint8),
        )  # fmt: skip

    @property
    def has_minimum(self) -> bool:
        """Whether blocks have a minimum beside the scale."""
        return self.search.spec.zero == "min"

    def _ends(self, w: Floats) -> tuple[Floats, Floats]:
        """What u is counted from, and the distance to where it is UNITS: [blocks]."""
        low, high = w.min(0), w.max(0)
        if self.has_minimum:
            return low, high - low
        return np.zeros_like(low), np.where(-low > high, low, high)

    def _candidates(self, u: Shorts) -> Iterator[Sums]:
        total, one = self._sum(u), np.full(1, len(u), np.float32)
        for factor, bias in self.candidates:
            levels = self._levels(u, np.int16(factor), np.int16(bias))
            sums = Sums(self._sum(levels * u.astype(np.int32)), self._sum(levels * levels))
            yield Sums(sums.wl, sums.ll, self._sum(levels), total, one) if self.has_minimum else sums

    def _levels(self, u: Shorts, factor: NDArray[np.int16] | np.int16, bias: NDArray[np.int16] | np.int16) -> Shorts:
        scaled = ((u.astype(np.int32) * factor + (1 << 14)) >> 15).astype(np.int16)
        levels = Levels.of(self.search.spec)
        low, high = np.int16(levels.low), np.int16(levels.high)
        placed: Shorts = np.clip((scaled + bias) >> np.int16(self.fraction), low, high)
        return placed

    def _placed(self, scale: Floats, offset: Floats, low: Floats, step: Floats) -> tuple[Shorts, Shorts]:
        """Factor and bias for a stored scale and offset."""
        one = np.float32(1 << self.fraction)
        wide = inverse(scale) * one
        factor = whole(step * wide * np.float32(1 << 15), -LARGEST_FACTOR, LARGEST_FACTOR)
        bias = whole((low - offset) * wide, -LARGEST_BIAS, LARGEST_BIAS) + one * np.float32(0.5)
        return factor.astype(np.int16), bias.astype(np.int16)

    @staticmethod
    def _sum(values: NDArray[np.int16] | NDArray[np.int32]) -> Floats:
        total: Floats = values.sum(0, dtype=np.int32).astype(np.float32)
        return total
