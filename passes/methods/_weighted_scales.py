"""Scales of groups whose columns count differently: the least of sum_i v_i |w_i - s (q_i - z)|^2 over a few ranges.

For the codes q that a range gives, the best scale is sum v w (q - z) / sum v (q - z)^2, and what it explains of the
error is the square of the numerator over the denominator: the range that explains most is chosen. Ranges narrower than
the group clip its largest weights, which pays at low widths.

Groups are held transposed, [n, group, out], for the sums to run along whole rows.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ptqc import grid, storage
from ptqc.codebooks import nearest_codes
from ptqc.passes.methods._error_feedback import Levels, Scales, inverse_of
from ptqc.passes.methods.rtn import round_to_nearest
from ptqc.spec import WeightSpec

__all__ = ["ScalePlan", "can_search", "nearest_levels"]

_AT_ONCE = 1 << 18
"""Weights searched at a time, so that they stay in the cache."""
_STEPS = tuple(step / 3 for step in range(16))
_ENDS = (0.0, 0.5, 1.0, 1.5, 2.0)


def nearest_levels(spec: WeightSpec) -> Levels:
    """The function that rounds values in units of the scale to levels of the spec."""
    book = spec.book
    if book is not None and book.float_dtype is not None:
        return lambda values: values.clamp_(-book.largest, book.largest).to(book.float_dtype).float()
    if book is not None:
        table = book.table()
        return lambda values: table[nearest_codes(values, table).int()]
    low = -(2 ** (spec.bits - 1)) if spec.is_symmetric else 0
    high = low + 2**spec.bits - 1
    return lambda values: values.round_().clamp_(low, high)


def can_search(spec: WeightSpec) -> bool:
    """Whether a group's scale is a float of its own, stored almost as it is."""
    return spec.rows == 1 and spec.scale.bits is None and spec.scale.dtype in ("f16", "bf16", "f32")


class ScalePlan:
    """The scales of one weight: chosen all at once, or group by group as they are reached.

    weight: [stack, out, in] in the stored order. importance: [stack, in], of its columns. is_searched: otherwise the
    range of each group. Specs whose scales are shared by rows, or stored coarsely, get those of rounding to nearest.
    """

    def __init__(self, weight: Tensor, importance: Tensor, spec: WeightSpec, is_searched: bool) -> None:
        self.weight, self.importance, self.spec, self.is_searched = weight, importance, spec, is_searched
        stack, out_features, in_features = weight.shape
        self.group = spec.group or in_features
        self.coarse: storage.Codes | None = None
        shape = (stack, spec.groups(weight.shape)[1], out_features)
        self.scales = Scales(weight.new_zeros(shape), None if spec.is_symmetric else weight.new_zeros(shape))

    def choose_all(self) -> None:
        """Choose the scales of all groups for the weight as it is."""
        if not can_search(self.spec):
            self._choose_coarse()
            return
        groups = self.weight.mT.contiguous().view(-1, self.group, self.weight.shape[1])
        self._set(
            slice(None), *_group_scales(groups, self.importance.view(-1, self.group), self.spec, self.is_searched)
        )

    def choose_one(self, number: int, group: Tensor) -> None:
        """Choose the scales of one group. group: [stack, group, out], its weights by now."""
        importance = self.importance[:, number * self.group : (number + 1) * self.group]
        self._set(number, *_group_scales(group, importance, self.spec, self.is_searched))

    def _set(self, number: int | slice, scale: Tensor, zero: Tensor | None) -> None:
        target = self.scales.scale[:, number]
        target.copy_(scale.view_as(target))
        if zero is not None and self.scales.zero is not None:
            self.scales.zero[:, number] = zero.view_as(target)

    def _choose_coarse(self) -> None:
        self.coarse = round_to_nearest(self.weight, self.spec)
        rows = self.spec.rows or self.weight.shape[1]
        pair = _as_read(self.coarse, self.spec)
        scale, zero = (
            None if each is None else each.repeat_interleave(rows, -2)[:, : self.weight.shape[1]].mT.contiguous()
            for each in pair
        )
        assert scale is not None
        if zero is not None and self.spec.zero == "min":
            zero = zero * inverse_of(scale)
        self.scales.scale, self.scales.zero = scale, zero

    def codes(self, numbers: Tensor) -> storage.Codes:
        """Logical form of numbers [stack, out, in] that are on the levels of these scales."""
        logical = self.coarse
        if logical is None:
            scale, zero = self.scales.scale, self.scales.zero
            if zero is not None:
                zero = (zero * scale if self.spec.zero == "min" else zero).mT.contiguous()
            logical = storage.Codes(numbers, scale.mT.contiguous(), zero)
        return replace(logical, codes=grid.choose_codes(numbers, *_as_read(logical, self.spec), self.spec))


def _as_read(logical: storage.Codes, spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero in logical form as they are read back."""
    scale, zero = storage.round_scale(logical.scale, spec), logical.zero
    if zero is not None and spec.zero != "int":
        zero = storage.round_scale(zero, spec, zero_minimum=True)
    return scale, zero


def _group_scales(
    groups: Tensor, importance: Tensor, spec: WeightSpec, is_searched: bool
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros, zeros in units of the scale, each [n, out] as read back from storage.

    groups: [n, group, out]. importance: [n, group]. is_searched: otherwise the range of the group.
    """
    step = max(1, _AT_ONCE // groups[0].numel())
    parts = [
        _best(some, weights, spec, is_searched)
        for some, weights in zip(groups.split(step), importance.split(step), strict=True)
    ]
    zero = None if parts[0][1] is None else torch.cat([part[1] for part in parts if part[1] is not None])
    return torch.cat([part[0] for part in parts]), zero


def _best(groups: Tensor, importance: Tensor, spec: WeightSpec, is_searched: bool) -> tuple[Tensor, Tensor | None]:
    levels, weights = nearest_levels(spec), importance[:, None]
    found: tuple[Tensor, Tensor | None] | None = None
    most = torch.tensor(0.0)
    for scale, zero in _ranges(groups, spec):
        if not is_searched:
            return _stored(scale, zero, spec)
        level = groups * inverse_of(scale)[:, None]
        level = levels(level) if zero is None else levels(level.add_(zero[:, None])).sub_(zero[:, None])
        product = torch.bmm(weights, level * groups)[:, 0]
        square = torch.bmm(weights, level.square_())[:, 0]
        fitted = torch.where(square > 0, product / square, scale)
        explained = product * fitted
        if found is None:
            found, most = (fitted, zero), explained
            continue
        is_better = explained > most
        most = torch.where(is_better, explained, most)
        zeros = None if zero is None or found[1] is None else torch.where(is_better, zero, found[1])
        found = torch.where(is_better, fitted, found[0]), zeros
    assert found is not None
    return _stored(*found, spec)


def _stored(scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero as they are read back; zero in units of the scale."""
    read = storage.round_scale(scale, spec)
    if zero is None or spec.zero == "int":
        return read, zero
    if spec.zero == "float":
        return read, storage.round_scale(zero, spec, zero_minimum=True)
    return read, storage.round_scale(zero * scale, spec, zero_minimum=True) * inverse_of(read)


def _ranges(groups: Tensor, spec: WeightSpec) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and zeros worth a try, the range of the group first. Each [n, out]."""
    low, high = groups.amin(1).clamp_max_(0), groups.amax(1).clamp_min_(0)
    if spec.is_symmetric:
        largest = torch.maximum(-low, high)
        if _reaches_lower(spec):  # a negative scale puts the positive end there
            largest = torch.where(-low >= high, largest, -largest)
        yield from ((largest / units, None) for units in _reaches(spec))
        return
    top = 2**spec.bits - 1
    for below in _ENDS:
        for above in _ENDS:
            scale = (high / 2 - low / 2) / ((top + below + above) / 2)
            zero = (-low * inverse_of(scale)).sub_(below)
            yield scale, zero.round_().clamp_(0, top) if spec.zero == "int" else zero


def _reaches_lower(spec: WeightSpec) -> bool:
    """Whether the lowest level is farther from zero than the highest."""
    return spec.book is None or (spec.book.float_dtype is None and -min(spec.book.levels) > max(spec.book.levels))


def _reaches(spec: WeightSpec) -> Iterator[float]:
    """What the largest weight of a symmetric group becomes, in units of the scale."""
    if spec.book is None:
        steps = 2 ** (spec.bits - 1)
        yield from (max(steps - 1, 0.5) + step for step in _STEPS)
        return
    largest = spec.book.largest
    yield largest
    if spec.codebook == "ternary":
        yield from (1 + step for step in _STEPS[1:])
    elif spec.book.float_dtype is None:
        yield from (largest * (1 + step / 16) for step in _STEPS[1:])
