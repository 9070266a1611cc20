"""Round to nearest: the scale of each group from its range, each weight to the nearest level.

Works for every spec: integers with and without a zero, codebooks, float8, ternary, superblocks. Symmetric integer
groups try the three usual scales (largest magnitude at the negative end, at the positive end, and between) and keep
the one with the least squared error, so a weight that lies on the grid is stored exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptqc import grid, storage
from ptqc.methods import METHODS, whole_row
from ptqc.spec import WeightSpec, Zero

__all__ = ["RoundToNearest", "affine_range", "round_to_nearest", "symmetric_scales"]


@METHODS.register("rtn")
@dataclass(frozen=True)
class RoundToNearest:
    """Round to nearest. symmetric: no zero point; otherwise an integer one."""

    symmetric: bool = True

    needs: ClassVar[frozenset[str]] = frozenset()

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        """4 bits in groups of 64 unless asked otherwise."""
        zero: Zero = "none" if self.symmetric or bits in (1.5, 1.58, 1.6) else "int"
        return WeightSpec.integer(4 if bits is None else bits, whole_row(group, 64), zero)

    def refuses(self, spec: WeightSpec) -> str | None:
        """Only lattice codebooks: they have no nearest level per weight."""
        if spec.vector == 1:
            return None
        return f"rtn rounds single weights, not the vectors of {spec}; use a spec such as {self.spec()}"

    def choose(self, weight: Tensor, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
        """See `ptqc.methods.Method`."""
        return round_to_nearest(weight, spec)


def round_to_nearest(weight: Tensor, spec: WeightSpec) -> storage.Codes:
    """Codes, scales and zeros of a weight [..., out, in] float32 from the range of its groups."""
    if not spec.is_symmetric:
        scale, zero = affine_range(weight, spec)
        return storage.Codes(grid.choose_codes(weight, scale, zero, spec), scale, zero)
    candidates = [at_scale(weight, scale, spec) for scale in symmetric_scales(weight, spec)]
    return least_error(weight, candidates, spec)


def symmetric_scales(weight: Tensor, spec: WeightSpec) -> list[Tensor]:
    """Candidate scales of every group for a spec without a zero."""
    low, high = grid.extremes(weight, spec)
    largest = torch.maximum(-low, high)
    if spec.codebook == "ternary":  # 0.7 of the mean magnitude separates 0 from 1 best (Li et al. 2016, 1605.04711)
        return [_mean_above(weight, spec)]
    if spec.book is not None:
        return [largest / spec.book.largest]
    steps = 2 ** (spec.bits - 1)
    signed = torch.where(-low >= high, largest, -largest)  # a negative scale puts the positive end at -2**(bits-1)
    return [signed / steps, largest / max(steps - 1, 0.5), largest / (steps - 0.5)]


def _mean_above(weight: Tensor, spec: WeightSpec) -> Tensor:
    magnitude = grid.tiles(weight, spec).abs()
    counted = magnitude >= 0.7 * magnitude.mean(-1, keepdim=True)
    return (magnitude * counted).sum(-1) / counted.sum(-1).clamp_min(1)


def affine_range(weight: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero that spread the levels over the range of each group, zero included.

    Returns both as they will be read back from storage.
    """
    low, high = grid.extremes(weight, spec)
    low, high = low.clamp_max(0), high.clamp_min(0)
    # Halved, because the range of a float32 group may itself be more than float32 holds.
    scale = storage.round_scale((high / 2 - low / 2) / ((2**spec.bits - 1) / 2), spec)
    if spec.zero == "min":
        return scale, storage.round_scale(-low, spec, zero_minimum=True)
    zero = torch.where(scale == 0, 0.0, -low / scale)
    if spec.zero == "int":
        return scale, zero.round().clamp(0, 2**spec.bits - 1)
    return scale, storage.round_scale(zero, spec, zero_minimum=True)


def at_scale(weight: Tensor, scale: Tensor, spec: WeightSpec) -> storage.Codes:
    """The nearest codes for given scales, rounded as they will be stored.

    Doubly quantized scales are the exception: QLoRA chooses codes before it quantizes the scales, and whoever reads
    its checkpoints expects these codes.
    """
    stored = scale if spec.scale.dynamic else storage.round_scale(scale, spec)
    return storage.Codes(grid.choose_codes(weight, stored, None, spec), scale)


def least_error(weight: Tensor, candidates: list[storage.Codes], spec: WeightSpec) -> storage.Codes:
    """Per group the scale of the candidate with the least squared error, and its codes."""
    if len(candidates) == 1:
        return candidates[0]
    errors = torch.stack([grid.group_error(weight, candidate, spec) for candidate in candidates])
    best = errors.argmin(0, keepdim=True)
    scale = torch.stack([candidate.scale for candidate in candidates]).gather(0, best)[0]
    return at_scale(weight, scale, spec)
