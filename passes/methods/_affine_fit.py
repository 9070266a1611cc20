"""Least squares between weights and codes: the closed-form half of an alternation, for many groups at once.

A group of weights w with importances v is stored as s (q - z). For given codes q the best s and z follow from five
sums; for given s and z the best codes follow by rounding. Weights are held centred and in units of a power of two
near the largest of the group, so that sums neither overflow nor cancel; scales and zeros in here refer to those.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqc import storage
from ptqc.spec import WeightSpec

__all__ = ["Chunk", "Fit"]

_FARTHEST_ZERO = 512
"""A float16 zero no more than this many codes away from the range is off by a quarter of a code at most."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A scale and zero for every group, and how far the weights are from them. Tensors of one entry per group."""

    scale: Tensor
    zero: Tensor
    error: Tensor

    def or_better(self, other: "Fit") -> "Fit":
        """Per group the one with the smaller error, this one on a tie."""
        return other.where(other.error < self.error, self)

    def where(self, condition: Tensor, other: "Fit") -> "Fit":
        """Per group this one where the condition holds, else the other."""
        pairs = ((self.scale, other.scale), (self.zero, other.zero), (self.error, other.error))
        return Fit(*(torch.where(condition, mine, theirs) for mine, theirs in pairs))


class Chunk:
    """Groups of weights, and the codes last chosen for them.

    groups: [n, group] float32, left alone. spec: what is stored (one scale per row of `groups`). norm: p of the error.
    weighted: importances 1 + |w| / rms, else 1.
    """

    def __init__(self, groups: Tensor, spec: WeightSpec, norm: float, weighted: bool) -> None:
        self.spec, self.norm, self.group = spec, norm, groups.shape[1]
        is_ternary = spec.codebook == "ternary"
        self.top: int = 2 if is_ternary else 2**spec.bits - 1
        self.fixed_zero = (1 if is_ternary else 2 ** (spec.bits - 1)) if spec.is_symmetric else None
        self.is_free = spec.zero in ("float", "min")
        largest = groups.abs().amax(-1, keepdim=True)
        self.unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-120, 120))
        self.weights = groups * (1 / self.unit)
        self.low, self.high = self.weights.amin(-1, keepdim=True), self.weights.amax(-1, keepdim=True)
        self.importance = self._importances() if weighted else torch.ones_like(self.weights)
        self.mass = _sum(self.importance)
        self.centre = torch.zeros_like(self.mass)
        self.floor = torch.full_like(self.mass, -torch.inf)
        if self.is_free:
            self._centre()
        self.weighted = self.importance * self.weights
        self.moment = None if self.is_free else _sum(self.weighted)
        self.codes, self.scratch = torch.empty_like(self.weights), torch.empty_like(self.weights)

    def _importances(self) -> Tensor:
        rms = self.weights.square().mean(-1, keepdim=True).sqrt_()
        return self.weights.abs().div_(rms.clamp_min_(1e-30)).add_(1)

    def _centre(self) -> None:
        if self.spec.zero == "float":
            self.floor = torch.maximum(self.low.abs(), self.high.abs()) / _FARTHEST_ZERO
        self.centre = _sum(self.importance * self.weights) / self.mass
        for values in (self.weights, self.low, self.high):
            values -= self.centre

    # ---------------------------------------------------------------- codes from a scale and zero, and back

    def fit(self, scale: Tensor, zero: Tensor) -> Fit:
        """Choose codes, and the best scale and zero for them; infinite error where the codes are all alike.

        Errors are squared ones, less a constant of the group.
        """
        self._choose(1 / scale, zero)
        return self._solve(self.weighted, self.moment)

    def fit_without_outliers(self, present: Fit, beta: float) -> Fit:
        """The best scale and zero for the codes that were judged last, outliers set aside.

        Of a residual r, in steps, half-quadratic splitting sets |r| - |r|^(norm - 1) / beta aside if that is positive.
        """
        residual = self.weights / present.scale - (self.codes - present.zero)
        magnitude = residual.abs()
        outliers = (magnitude - magnitude.pow(self.norm - 1).div_(beta)).clamp_min_(0).copysign_(residual)
        targets = self.importance * (self.weights - outliers.mul_(present.scale))
        return self._solve(targets, _sum(targets))

    def _choose(self, inverse: Tensor, zero: Tensor) -> None:
        torch.mul(self.weights, inverse, out=self.codes)
        self.codes.add_(zero).round_().clamp_(0, self.top)

    def _solve(self, targets: Tensor, moment: Tensor | None) -> Fit:
        """Least squares of targets (times importance, their sums the moment; None: zero) on the present codes."""
        product = _sum(torch.mul(self.codes, targets, out=self.scratch))
        first = _sum(torch.mul(self.codes, self.importance, out=self.scratch))
        second = _sum(self.scratch.mul_(self.codes))
        zero = mean = first / self.mass
        explained, spread = product, second - mean * first
        if moment is not None:
            explained = product - mean * moment
            zero = mean - moment / self.mass * (spread / explained)
        if not self.is_free:
            zero = self._allowed(zero)
            spread = second - zero * (2 * first - zero * self.mass)
            explained = product if moment is None else product - zero * moment
        scale = explained / spread
        return Fit(scale, zero, torch.where(spread > 1e-6 * second, -scale * explained, torch.inf))

    def _allowed(self, zero: Tensor) -> Tensor:
        """The nearest zero that the spec can store."""
        if self.fixed_zero is not None:
            return torch.full_like(zero, self.fixed_zero)
        return zero.nan_to_num().round_().clamp_(0, self.top)

    def judge(self, scale: Tensor, zero: Tensor) -> Fit:
        """Round a scale and zero as storing will, choose codes for them, and measure sum v |w - s (q - z)|^norm."""
        scale, zero = self.from_stored(*self.to_stored(scale, zero))
        self._choose(_ratio(torch.ones_like(scale), scale), zero)
        residual = torch.sub(self.codes, zero, out=self.scratch).mul_(scale).sub_(self.weights)
        power = residual.square_() if self.norm == 2 else residual.abs_().pow_(self.norm)
        error = _sum(power.mul_(self.importance)).nan_to_num_(torch.inf)
        if self.spec.zero == "float":  # a scale of zero stands for zeros, not for the centre
            error.masked_fill_(scale == 0, torch.inf)
        return Fit(scale, zero, error)

    # ---------------------------------------------------------------- to and from what is stored

    def to_stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero as they will be read back, [n, 1]."""
        stored = storage.round_scale(torch.maximum(scale, self.floor) * self.unit, self.spec)
        centre = self.centre * self.unit
        if self.fixed_zero is not None:
            return stored, None
        if self.spec.zero == "int":
            return stored, self._allowed(zero)
        free = stored * zero - centre if self.spec.zero == "min" else zero - _ratio(centre, stored)
        return stored, storage.round_scale(free, self.spec, zero_minimum=True)

    def from_stored(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Invert `to_stored`. scale, zero: [n, 1]."""
        scale = scale / self.unit
        if zero is None:
            return scale, torch.full_like(scale, self.fixed_zero or 0)
        if self.spec.zero == "min":
            return scale, _ratio(zero / self.unit + self.centre, scale)
        return scale, zero + _ratio(self.centre, scale)


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


def _ratio(numerator: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, numerator / scale)
