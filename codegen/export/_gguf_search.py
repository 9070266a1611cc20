"""Scales and codes of a block: the least sum_i v_i (w_i - (s l_i - m))^2 over a search, for every spec that GGUF has.

Groups of weights share a scale s (and a minimum m); the levels l are integers or a small table. In superblocks scales
and minima are themselves integers, under one float16 number each. The search, on all groups of a tile at once:

1. A few candidates put the group's range on the levels in different ways, narrower ones clipping its largest weights.
   For the levels that a candidate gives, the best scale and minimum are known in closed form, and so is what they
   explain of the error; the candidate that explains most is kept.
2. Levels are chosen for these scales as they are stored, scales are fitted to these levels, in turn. The error of each
   turn is known from sums that the fit needs anyway; the best turn is kept, for every superblock.

v is the importance of a column: the mean square of the input it is multiplied with makes the sum the expected error of
the output. Without importance v is 1.

Weights are held as [group, weight, row]: sums run along whole rows, and NumPy works at the speed of the cache.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptqc.codegen.export._gguf_layouts import Fields
from ptqc.codegen.export._gguf_levels import HALF_MAX, TINY, Levels, half, inverse, whole
from ptqc.spec import WeightSpec

__all__ = ["PEAKS_OF_SCALES", "Fit", "Search", "Sums", "best_of", "largest_magnitude", "solve"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Fit:
    """Scale, and minimum or None, of groups [groups, rows]."""

    scale: Floats
    minimum: Floats | None


@dataclass(frozen=True)
class Sums:
    """Sums of v times ... over the weights w and levels l of groups, [groups, rows] or [groups, 1]."""

    wl: Floats
    ll: Floats
    l: Floats | None = None  # noqa: E741
    w: Floats | None = None
    one: Floats | None = None

    def gain(self, fit: Fit) -> Floats:
        """What a fit explains of the sum of w^2."""
        gain: Floats = fit.scale * (2 * self.wl - fit.scale * self.ll)
        if fit.minimum is not None and self.l is not None and self.w is not None and self.one is not None:
            gain -= fit.minimum * (2 * (self.w - fit.scale * self.l) + fit.minimum * self.one)
        return gain

    def replace(self, other: "Sums", chosen: NDArray[np.bool_]) -> None:
        """Take over the other's sums of levels where chosen; those without levels are the same."""
        for mine, its in ((self.wl, other.wl), (self.ll, other.ll), (self.l, other.l)):
            if mine is not None and its is not None:
                np.copyto(mine, its, where=chosen)


def solve(sums: Sums, is_nested: bool) -> Fit:
    """The best scale and minimum for given levels; nested, a minimum below zero becomes zero."""
    plain: Floats = np.divide(sums.wl, np.maximum(sums.ll, TINY))
    if sums.l is None or sums.w is None or sums.one is None:
        return Fit(plain, None)
    determinant = sums.one * sums.ll - sums.l * sums.l
    is_even = determinant > np.float32(1e-6) * sums.one * sums.ll  # otherwise all levels are the same
    over = np.divide(1, determinant, out=np.zeros_like(determinant), where=is_even)
    scale = (sums.one * sums.wl - sums.l * sums.w) * over
    minimum: Floats = (sums.l * scale - sums.w) / sums.one
    if is_nested:
        scale = _pick((minimum > 0) & is_even, scale, plain)
        minimum = _pick(is_even, np.maximum(minimum, 0), 0 * minimum)
        minimum = _pick((sums.ll == 0) & (sums.w < 0), -sums.w / sums.one, minimum)
    return Fit(scale, minimum)


def best_of(candidates: Iterable[Sums], is_nested: bool) -> Sums:
    """The sums that explain most, group by group; the first of them is written to."""
    best, most = None, None
    for sums in candidates:
        gain = sums.gain(solve(sums, is_nested))
        if best is None or most is None:
            best, most = sums, gain
            continue
        best.replace(sums, gain > most)
        most = np.maximum(gain, most)
    assert best is not None
    return best


@dataclass(frozen=True)
class Search:
    """How to choose the codes of one type.

    peaks: for specs without minimum, levels on which to try the group's largest magnitude. ends: with minimum, pairs
    of how many levels to clip below and above (less than 0 leaves levels unused). turns: of step 2.
    """

    spec: WeightSpec
    peaks: tuple[float, ...] = ()
    ends: tuple[tuple[float, float], ...] = ()
    turns: int = 3

    @property
    def candidates(self) -> tuple[tuple[np.float32, np.float32], ...]:
        """Factor and offset that put the unit interval (with minimum), or the weights over the largest, on levels."""
        top = np.float32(Levels.of(self.spec).high)
        ends = [(top + np.float32(below + above), np.float32(below)) for below, above in self.ends]
        return tuple(ends or [(np.float32(peak), np.float32(0)) for peak in self.peaks])

    @property
    def range_of_scales(self) -> tuple[int, int]:
        """The integers that hold the scales of groups; (0, 0) where these are floats."""
        scale = self.spec.scale
        if scale.bits is None:
            return 0, 0
        low = -(2 ** (scale.bits - 1)) if scale.signed else 0
        return low, low + 2**scale.bits - 1

    def run(self, weights: Floats, importance: Floats | None) -> Fields:
        """Encode rows [rows, columns] of whole superblocks. importance: [columns], positive, or None."""
        if len(weights) == 1:  # NumPy would add up a lone row in another order
            return self.run(np.repeat(weights, 2, axis=0), importance).first_half
        group, per_block = self.spec.group or 1, self.spec.scale.block or 1
        rows = len(weights)
        w = np.ascontiguousarray(weights.T).reshape(-1, group, rows)
        v = np.ones((len(w), group), np.float32) if importance is None else importance.reshape(-1, group)
        task = _Task(w, np.ascontiguousarray(v), importance is not None, Levels.of(self.spec), self)
        best = stored = task.stored(task.best_of(self._candidates(task)))
        most: Floats | None = None
        for turn in range(self.turns):
            sums = task.sums(task.levels_at(stored.fit))
            gain = _sum(_per_block(sums.gain(stored.fit), per_block))[:, None]
            if most is None:
                most = gain
            else:
                best = stored.where(gain > most, best)
                most = np.maximum(gain, most)
            if turn + 1 < self.turns:
                stored = task.stored(sums)
        return best.fields(task.codes_at(best.fit), group * per_block)

    def _candidates(self, task: "_Task") -> Iterator[Floats]:
        """Values in units of levels, to be rounded; each is the same array with new contents."""
        values = np.empty_like(task.w)
        if not self.ends:
            high, low = task.w.max(1, keepdims=True), task.w.min(1, keepdims=True)
            unit = task.w * inverse(_pick(-low > high, low, high))
            for peak, _ in self.candidates:
                yield np.multiply(unit, peak, out=values)
            return
        low, high = task.w.min(1, keepdims=True), task.w.max(1, keepdims=True)
        if task.is_nested:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        unit = (task.w - low) * inverse(high - low)
        for stretch, shift in self.candidates:
            np.multiply(unit, stretch, out=values)
            values -= shift
            yield values


class _Task:
    """A tile: weights w [groups, group, rows], and their importance v [groups, group]."""

    def __init__(self, w: Floats, v: Floats, is_weighted: bool, levels: Levels, search: Search) -> None:
        self.w, self.v, self.levels, self.search = w, v[..., None], levels, search
        self.is_weighted, self.is_nested = is_weighted, search.spec.scale.bits is not None
        self.has_minimum = search.spec.zero == "min"
        self._product, self._values, self._counted = np.empty_like(w), np.empty_like(w), np.empty_like(w)
        self._w = _sum(self._times_importance(w)) if self.has_minimum else None
        self._one = np.add.accumulate(v, axis=1)[:, -1:]

    def _times_importance(self, values: Floats) -> Floats:
        return np.multiply(values, self.v, out=self._counted) if self.is_weighted else values

    def sums(self, levels: Floats) -> Sums:
        """The sums for levels [groups, group, rows]."""
        counted = self._times_importance(levels)
        wl = _sum(np.multiply(counted, self.w, out=self._product))
        ll = _sum(np.multiply(counted, levels, out=self._product))
        return Sums(wl, ll, _sum(counted), self._w, self._one) if self.has_minimum else Sums(wl, ll)

    def best_of(self, candidates: Iterator[Floats]) -> Sums:
        """The sums of the candidate that explains most."""
        return best_of((self.sums(self.levels.nearest(values)) for values in candidates), self.is_nested)

    def _values_at(self, fit: Fit) -> Floats:
        values = self._values
        if fit.minimum is None:
            return np.multiply(self.w, inverse(fit.scale)[:, None], out=values)
        np.add(self.w, fit.minimum[:, None], out=values)
        values *= inverse(fit.scale)[:, None]
        return values

    def levels_at(self, fit: Fit) -> Floats:
        """The nearest levels under stored scales."""
        return self.levels.nearest(self._values_at(fit))

    def codes_at(self, fit: Fit) -> Bytes:
        """Their codes."""
        return self.levels.codes(self._values_at(fit))

    def stored(self, sums: Sums) -> "Stored":
        """The best scales and minima for given levels, as a file holds them."""
        fit, scale = solve(sums, self.is_nested), self.search.spec.scale
        if scale.bits is None or scale.block is None:
            return Stored([half(fit.scale)] + ([] if fit.minimum is None else [half(-fit.minimum)]), [])
        low, high = self.search.range_of_scales
        split = (_per_block(fit.scale, scale.block), _per_block(sums.ll, scale.block))
        outer, codes = _nested(*split, low, high)
        if fit.minimum is None or sums.l is None or sums.w is None or sums.one is None:
            return Stored([outer], [codes], low)
        read = (outer * codes).reshape(fit.scale.shape)
        minimum = np.maximum((sums.l * read - sums.w) / sums.one, 0)  # the best for the scales as stored
        split = (_per_block(minimum, scale.block), _per_block(sums.one, scale.block))
        floor, floor_codes = _nested(*split, 0, high - low)
        return Stored([outer, floor], [codes, floor_codes], low)


@dataclass(frozen=True)
class Stored:
    """Scales, then minima, as stored. outer: float16 numbers in float32: [blocks, 1, rows], or [groups, rows] where
    they are the scales themselves (the second with its sign turned). codes: [blocks, groups, rows], from `low`."""

    outer: list[Floats]
    codes: list[Floats]
    low: int = 0

    @property
    def fit(self) -> Fit:
        """What the reader of the file makes of them."""
        if not self.codes:
            return Fit(self.outer[0], -self.outer[1] if len(self.outer) > 1 else None)
        numbers = [(o * c).reshape(-1, c.shape[-1]) for o, c in zip(self.outer, self.codes, strict=True)]
        return Fit(numbers[0], numbers[1] if len(numbers) > 1 else None)

    def where(self, chosen: NDArray[np.bool_], other: "Stored") -> "Stored":
        """These where chosen [blocks, 1, rows], else the other's."""
        flat = chosen if self.codes else chosen[:, 0]
        outer = [_pick(flat, mine, its) for mine, its in zip(self.outer, other.outer, strict=True)]
        codes = [_pick(chosen, mine, its) for mine, its in zip(self.codes, other.codes, strict=True)]
        return Stored(outer, codes, self.low)

    def fields(self, codes: Bytes, weights: int) -> Fields:
        """The contents of blocks of `weights`, row after row. codes: [groups, group, rows]."""
        rows = codes.shape[-1]
        floats = np.stack([part.reshape(-1, rows).astype(np.float16) for part in self.outer])  # [floats, blocks, rows]
        low = np.float32(self.low)
        parts = [(part - (low if n == 0 else np.float32(0))).astype(np.uint8) for n, part in enumerate(self.codes)]
        scales = np.concatenate(parts, axis=1) if parts else np.empty((len(floats[0]), 0, rows), np.uint8)
        return Fields(
            codes.reshape(-1, rows).T.reshape(-1, weights),
            np.ascontiguousarray(floats.transpose(2, 1, 0)).reshape(-1, len(floats)),
            np.ascontiguousarray(scales.transpose(2, 0, 1)).reshape(rows * len(scales), -1),
        )


PEAKS_OF_SCALES = {
    15: tuple(1 - step / 45 for step in range(-1, 10)),  # 4 bits
    31: (1.0, 1.01, 0.97, 0.94, 0.91, 0.88),  # 6 bits, signed
    63: (1.0, 1.005, 0.985, 0.97, 0.95),  # 6 bits
    127: (1.0, 0.99),  # 8 bits, signed
}
"""By the greatest integer: where to try the largest scale of a superblock, relative to the last integer."""


def _nested(scale: Floats, weight: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    """Integers low..high under one float16 number: [blocks, groups, rows] -> [blocks, 1, rows], [blocks, groups, rows].

    weight: what the squared error of a scale counts. The outer number is searched as the scale of a group is.
    """
    largest = scale.max(1, keepdims=True)
    if low < 0:
        smallest = scale.min(1, keepdims=True)
        largest = _pick(-smallest > largest, smallest, largest)
    unit, counted = scale * inverse(largest), scale * weight
    best, most = np.zeros_like(largest), np.full_like(largest, -1)
    codes, part = np.empty_like(scale), np.empty_like(scale)
    for peak in PEAKS_OF_SCALES[high]:
        np.multiply(unit, np.float32(peak * (low or high)), out=codes)
        whole(codes, low, high)
        product = _sum(np.multiply(codes, counted, out=part))[:, None]
        np.multiply(codes, codes, out=codes)
        fitted = product / np.maximum(_sum(np.multiply(codes, weight, out=part))[:, None], TINY)
        gain = product * fitted
        is_better = gain > most
        np.copyto(most, gain, where=is_better)
        np.copyto(best, fitted, where=is_better)
    outer = half(best)
    return outer, whole(scale * inverse(outer), low, high)


def _sum(values: Floats) -> Floats:
    """[a, n, b] -> [a, b]: one after the other, as b > 1 makes NumPy do it."""
    total: Floats = np.add.reduce(values, axis=1)
    return total


def _per_block(groups: Floats, per_block: int) -> Floats:
    """[groups, rows] -> [blocks, groups of a block, rows]."""
    return groups.reshape(-1, per_block, groups.shape[-1])


def _pick(chosen: NDArray[np.bool_], yes: Floats, no: Floats) -> Floats:
    picked = np.array(np.broadcast_to(no, np.broadcast_shapes(chosen.shape, yes.shape, no.shape)))
    np.copyto(picked, yes, where=chosen)
    return picked


def largest_magnitude(spec: WeightSpec) -> float:
    """The greatest magnitude that fits, with room for whatever scale the search may try."""
    codes = 1 if spec.scale.bits is None else 2 ** (spec.scale.bits - spec.scale.signed) - 1
    levels = Levels.of(spec)
    reach = 1 if spec.zero == "min" else max(-levels.low, levels.high)
    return float(HALF_MAX) * codes * reach / 2
