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
        return self.where(other.error >= self.error, other)

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
        # Short groups lie along columns, so that scales broadcast along the long axis: six times faster (AVX512).
        self.axis = 0 if groups.shape[1] <= 128 else 1
        self._normalise(groups.t() if self.axis == 0 else groups)
        self.low, self.high = self.weights.aminmax(dim=self.axis, keepdim=True)
        self.importance = self._importances() if weighted else torch.ones_like(self.weights)
        self.mass = self._sum(self.importance)
        self.centre = torch.zeros_like(self.mass)
        self.floor = torch.full_like(self.mass, -torch.inf)
        if spec.zero in ("float", "min"):
            self._centre()
        self.weighted = self.importance * self.weights
        self.moment = self._sum(self.weighted)
        self.codes, self.scratch = torch.empty_like(self.weights), torch.empty_like(self.weights)

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(self.axis, keepdim=True)

    def _normalise(self, groups: Tensor) -> None:
        largest = groups.abs().amax(self.axis, keepdim=True)
        self.unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-120, 120))
        self.weights = torch.mul(groups, 1 / self.unit, out=torch.empty(groups.shape, device=groups.device))

    def _importances(self) -> Tensor:
        rms = self.weights.square().mean(self.axis, keepdim=True).sqrt_()
        return self.weights.abs().div_(rms.clamp_min_(1e-30)).add_(1)

    def _centre(self) -> None:
        if self.spec.zero == "float":
            self.floor = torch.maximum(self.low.abs(), self.high.abs()) / _FARTHEST_ZERO
        self.centre = self._sum(self.importance * self.weights) / self.mass
        for values in (self.weights, self.low, self.high):
            values -= self.centre

    # ---------------------------------------------------------------- codes from a scale and zero, and back

    def choose(self, scale: Tensor, zero: Tensor) -> None:
        """Set `codes` to the nearest ones."""
        torch.mul(self.weights, torch.where(scale == 0, 0.0, 1 / scale), out=self.codes)
        self.codes.add_(zero).round_().clamp_(0, self.top)

    def fit(self, present: Fit, beta: float | None = None) -> Fit:
        """The best scale and zero for the present codes; where codes are all alike, the present fit with infinite error.

        beta: shrink the outliers of the residual away first. Errors are squared ones, less a constant of the group.
        """
        targets, moment = self.weighted, self.moment
        if beta is not None:
            targets = self.importance * (self.weights - self._outliers(present, beta))
            moment = self._sum(targets)
        product = self._sum(torch.mul(self.codes, targets, out=self.scratch))
        first = self._sum(torch.mul(self.codes, self.importance, out=self.scratch))
        second = self._sum(self.scratch.mul_(self.codes))
        zero = self._best_zero(first, second, product, moment)
        explained = product - zero * moment
        scale = explained / (second - 2 * zero * first + zero.square() * self.mass)
        gain = scale * explained
        is_fit = (gain > 0) & gain.isfinite() & ((scale > 0) | self.spec.is_symmetric)
        return Fit(scale, zero, -gain).where(is_fit, Fit(present.scale, present.zero, torch.full_like(gain, torch.inf)))

    def _best_zero(self, first: Tensor, second: Tensor, product: Tensor, moment: Tensor) -> Tensor:
        if self.fixed_zero is not None:
            return torch.full_like(first, self.fixed_zero)
        variance, covariance = second - first.square() / self.mass, product - first * moment / self.mass
        zero = (first - moment * variance / covariance) / self.mass
        return zero.round_().clamp_(0, self.top) if self.spec.zero == "int" else zero

    def _outliers(self, present: Fit, beta: float) -> Tensor:
        """What half-quadratic splitting sets aside: the residual, in steps, less its magnitude to the p - 1 over beta."""
        residual = self.weights / present.scale - (self.codes - present.zero)
        magnitude = residual.abs()
        kept = (magnitude - magnitude.pow(self.norm - 1).div_(beta)).clamp_min_(0)
        return kept.copysign_(residual).mul_(present.scale)

    def judge(self, scale: Tensor, zero: Tensor) -> Fit:
        """Round a scale and zero as storing will, choose codes for them, and measure sum v |w - s (q - z)|^norm."""
        scale, zero = self.from_stored(*self.to_stored(scale, zero))
        self.choose(scale, zero)
        residual = torch.sub(self.codes, zero, out=self.scratch).mul_(scale).sub_(self.weights)
        power = residual.square_() if self.norm == 2 else residual.abs_().pow_(self.norm)
        error = self._sum(power.mul_(self.importance)).nan_to_num_(torch.inf)
        if self.spec.zero == "float":  # a scale of zero stands for zeros, not for the centre
            error.masked_fill_(scale == 0, torch.inf)
        return Fit(scale, zero, error)

    # ---------------------------------------------------------------- to and from what is stored

    def to_stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero as they will be read back, [n, 1]."""
        stored = storage.round_scale(self._turned(torch.maximum(scale, self.floor) * self.unit), self.spec)
        zero, centre = self._turned(zero), self._turned(self.centre * self.unit)
        if self.fixed_zero is not None:
            return stored, None
        if self.spec.zero == "int":
            return stored, zero.round().clamp(0, self.top)
        free = stored * zero - centre if self.spec.zero == "min" else zero - _ratio(centre, stored)
        return stored, storage.round_scale(free, self.spec, zero_minimum=True)

    def from_stored(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Invert `to_stored`. scale, zero: [n, 1]."""
        scale = self._turned(scale) / self.unit
        if zero is None:
            return scale, torch.full_like(scale, self.fixed_zero or 0)
        zero = self._turned(zero)
        if self.spec.zero == "min":
            return scale, _ratio(zero / self.unit + self.centre, scale)
        return scale, zero + _ratio(self.centre, scale)

    def _turned(self, values: Tensor) -> Tensor:
        return values.t() if self.axis == 0 else values


def _ratio(numerator: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, numerator / scale)
