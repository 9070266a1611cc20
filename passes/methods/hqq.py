"""HQQ: scales and zeros that minimise the weight error itself, without data.

Badri and Shaji 2023, Half-Quadratic Quantization (mobiusml.github.io/hqq_blog). For every group of weights w,

    minimise  sum_i v_i |w_i - s (q_i - z)|^p   over integer codes q, scale s and zero z,

by half-quadratic splitting: with e the part of the residual that a shrinkage operator keeps as outliers, alternate
    q = round(w / s + z),    e = shrink(w - s (q - z)),    (s, z) = least squares of w - e on q.

Where we differ from the paper, and why (KL to the float logits of the reference model, benchmarks/methods_vs_peers.py):
1. s is solved for as well as z, in closed form, and the best iterate of every group is kept, judged with scale and zero
   as they will be stored. With s fixed at the range of the group, 2 bits waste half of their levels.
2. Alternation only finds the nearest local minimum, so it starts from the best of fourteen (scale, zero) pairs: three
   ranges, then moves of either end by a fraction of a step.
3. p is 2 by default (no shrinkage, plain least squares), not 0.7. In the paper's units shrinkage starts at residuals of
   0.17, which trained weights do not have, so that its solver is least squares as well. In units of a step, where
   shrinkage does act, p = 0.7 lowers its own objective by tolerating clipped outliers, and doubles the KL.
4. v = 1 + |w| / rms by default: large weights count more. It costs 1 to 5% of squared error and gains as much KL or
   more, because a large weight's relative error is what its output channel sees. weighted=False minimises plain error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ptqc import grid, storage
from ptqc.errors import SpecError
from ptqc.methods import METHODS, whole_row
from ptqc.passes.methods._affine_fit import Chunk, Fit
from ptqc.passes.methods.rtn import affine_range, symmetric_scales
from ptqc.spec import WeightSpec, Zero

__all__ = ["HalfQuadratic"]

_AT_ONCE = 1 << 16
"""Weights of a chunk for each thread of torch: its share of the half a dozen tensors stays in its cache."""
_BETA, _KAPPA = 10.0, 1.01
"""The paper's weight of the splitting, here in units of a step, and its growth per iteration."""


@METHODS.register("hqq")
@dataclass(frozen=True)
class HalfQuadratic:
    """Half-quadratic quantization.

    zero: "float" (the paper's), "int", "min" or "none". norm: p of the objective, above 0 and at most 2.
    weighted: let large weights count more. iterations: most alternations after the search for a start.
    """

    zero: Zero = "float"
    norm: float = 2.0
    weighted: bool = True
    iterations: int = 5

    needs: ClassVar[frozenset[str]] = frozenset()
    finds_ranges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 2:
            raise SpecError(f"hqq minimises a norm above 0 and at most 2, not {self.norm:g}; the paper has 0.7")
        if self.iterations < 1:
            raise SpecError(f"hqq needs at least one iteration, not {self.iterations}")

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        """4 bits in groups of 64 with a float zero unless asked otherwise; ternary weights are symmetric."""
        zero: Zero = "none" if bits in (1.5, 1.58, 1.6) else self.zero
        return WeightSpec.integer(4 if bits is None else bits, whole_row(group, 64), zero)

    def refuses(self, spec: WeightSpec) -> str | None:
        """Codebooks other than ternary, scales that several rows share, scales that are themselves quantized."""
        if spec.codebook not in (None, "ternary"):
            return f"hqq fits integer codes, not those of {spec}; use rtn for it, or a spec such as {self.spec()}"
        if spec.rows != 1 or spec.scale.bits is not None or spec.scale.dtype in ("e4m3", "e8m0"):
            return f"hqq fits a float scale to each group or row, unlike {spec}; use rtn for it, or {self.spec()}"
        return None

    def choose(self, weight: Tensor, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
        """See `ptqc.methods.Method`."""
        groups = weight.reshape(-1, spec.group or weight.shape[-1])
        alone = replace(spec, group=None)
        at_once = max(1, _AT_ONCE * torch.get_num_threads() // groups.shape[1])
        solved = [self._solve(some, alone) for some in groups.split(at_once if weight.is_cpu else len(groups))]
        columns = (*weight.shape[:-1], weight.shape[-1] // groups.shape[1])
        zeros = [one.zero for one in solved if one.zero is not None]
        return storage.Codes(
            torch.cat([one.codes for one in solved]).view(weight.shape),
            torch.cat([one.scale for one in solved]).view(columns),
            torch.cat(zeros).view(columns) if zeros else None,
        )

    def _solve(self, groups: Tensor, spec: WeightSpec) -> storage.Codes:
        """Solve groups [n, group] whose rows have one scale each."""
        chunk = Chunk(groups, spec, self.norm, self.weighted)
        best = self._least_squares(chunk) if self.norm == 2 else self._split(chunk)
        for scale, zero in _round_to_nearest(groups, spec):
            best = best.or_better(chunk.judge(*chunk.from_stored(scale, zero)))
        stored, stored_zero = chunk.to_stored(best.scale, best.zero)
        return storage.Codes(grid.choose_codes(groups, stored, stored_zero, spec), stored, stored_zero)

    def _least_squares(self, chunk: Chunk) -> Fit:
        """Codes for a fit, a fit for codes, until no group improves: with norm 2 there is nothing to set aside."""
        best = _start(chunk)
        for _ in range(self.iterations):
            trial = chunk.fit(best.scale, best.zero)
            if not (trial.error < best.error).any():
                break
            best = best.or_better(trial)
        return chunk.judge(best.scale, best.zero)

    def _split(self, chunk: Chunk) -> Fit:
        """Half-quadratic splitting; a group that has got worse stays where it was best."""
        start = _start(chunk)
        best = chunk.judge(start.scale, start.zero)
        improved = torch.ones_like(best.error, dtype=torch.bool)
        for iteration in range(self.iterations):
            trial = chunk.fit_without_outliers(best, _BETA * _KAPPA**iteration)
            improved = improved & (trial.error < torch.inf)
            trial = trial.where(improved, best)
            judged = chunk.judge(trial.scale, trial.zero)
            improved = improved & (judged.error < best.error)
            if not improved.any():
                break
            best = judged.where(improved, best)
        return best


# -------------------------------------------------------------------- where to start

_RANGES = (0.0, 0.7, 1.4)
"""Steps by which both ends of the range move inwards for the first three tries."""
_MOVES = ((0.4, 0.0), (-0.4, 0.0), (0.0, 0.4), (0.0, -0.4), (0.2, 0.2), (-0.2, -0.2), (0.2, -0.2), (-0.2, 0.2))
"""Steps by which the lower and the upper end of the best range so far move inwards for the next eight."""


def _start(chunk: Chunk) -> Fit:
    """The best of a dozen least-squares fits, each to the codes of another range."""
    found = Fit(*_range(chunk, 0.0), torch.full_like(chunk.low, torch.inf))
    longer = range(1, max(1, chunk.group // 64).bit_length())  # long groups have long tails: also halve, quarter, ...
    for inwards in (*_RANGES, *(chunk.top * (2**halvings - 1) / 2 for halvings in longer)):
        found = found.or_better(chunk.fit(*_range(chunk, inwards)))
    for lower, upper in _MOVES * (1 if chunk.group <= 128 else 3):
        found = found.or_better(chunk.fit(*_moved(chunk, found, lower, upper)))
    return found


def _range(chunk: Chunk, inwards: float) -> tuple[Tensor, Tensor]:
    """Scale and zero that spread the levels over the range of every group, each end `inwards` steps nearer."""
    if chunk.fixed_zero is None:
        scale = ((chunk.high - chunk.low) / (chunk.top + 2 * inwards)).clamp_min_(torch.finfo(torch.float32).tiny)
        return scale, -inwards - chunk.low / scale
    # There is one level more below zero than above: the larger end goes there.
    largest = torch.where(-chunk.low >= chunk.high, -chunk.low, -chunk.high)
    scale = largest / (chunk.fixed_zero + inwards)
    return scale.masked_fill_(largest == 0, 1.0), torch.full_like(largest, chunk.fixed_zero)


def _moved(chunk: Chunk, fit: Fit, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range of a fit, its ends moved inwards by so many steps."""
    factor = (chunk.top - lower - upper) / chunk.top
    return fit.scale * factor, fit.zero if chunk.fixed_zero is not None else (fit.zero - lower) / factor


def _round_to_nearest(groups: Tensor, spec: WeightSpec) -> list[tuple[Tensor, Tensor | None]]:
    """What rtn would store: never worse than that."""
    if spec.is_symmetric:
        return [(storage.round_scale(scale, spec), None) for scale in symmetric_scales(groups, spec)]
    return [affine_range(groups, spec)]
