"""AWQ: columns that meet large inputs are scaled up, so that rounding hurts them less; then ranges are clipped.

Lin, Tang, Tang, Yang, Chen, Wang, Dang, Gan, Han 2023, arXiv:2306.00978, section 3.2 and equations 4 and 5. For the
weights W that read one value x, with H = mean(x xT),

    minimise  sum over W of tr(E H ET),    E = Q(W diag(s)) diag(1/s) - W,

over scales s = mean|x|^a, and s = mean|x|^a / mean|w|^(1-a) with w relative to the largest of its group, a = 0 to 1.

Where we differ from the paper:
1. The objective is exact over the whole calibration set, through H, where the paper runs a sample of it; in the search
   it is taken over `rows` evenly spaced rows of each weight, and the winner is held against s = 1 on all of them.
2. From the best s of the grid on, descent on the expected error finds a scale for each channel (`_scale_search`).
3. Clipping sees the errors of the whole row (`_clipping`), and so needs no list of layers that it would harm.
4. Channels that several columns share (grouped-query attention) have one scale for all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptqc import grid
from ptqc.errors import PtqcError
from ptqc.passes.transforms._channels import averaged, bounded, channels_of
from ptqc.passes.transforms._clipping import clipped
from ptqc.passes.transforms._scale_search import Trial, cost, descended, trials
from ptqc.transforms import TRANSFORMS, Member, Transform

__all__ = ["AWQ"]


@TRANSFORMS.register("awq")
@dataclass(frozen=True)
class AWQ(Transform):
    """Activation-aware scaling and clipping.

    exponents: how many are tried. rows: of each weight, in the search for a scale. descent: go on from the best
    exponent channel by channel. clipping: clip ranges as well; to `narrowest` of a range at least, in `shares` steps.
    """

    exponents: int = 20
    rows: int = 512
    descent: bool = True
    clipping: bool = True
    narrowest: float = 0.7
    shares: int = 6

    default_method: ClassVar[str] = "rtn"
    default_options: ClassVar[Mapping[str, object]] = {"symmetric": False}
    default_group: ClassVar[int | None] = 128

    def __post_init__(self) -> None:
        if min(self.exponents, self.rows, self.shares) < 1:
            raise PtqcError(
                f"awq tries at least one exponent, row and clip, not {self.exponents}, {self.rows}, {self.shares}"
            )
        if not 0 < self.narrowest <= 1:
            raise PtqcError(f"awq clips to a share of the range above 0 and at most 1, not {self.narrowest:g}")

    @property
    def needs(self) -> frozenset[str]:
        """The second moment of the input, its mean magnitude, and how often it was seen."""
        return frozenset({"hessian", "mean_abs", "count"})

    def scale(self, members: Sequence[Member], channels: int) -> Tensor | None:
        """See `ptqc.transforms.Transform`. None where nothing beats s = 1, or codes are not of single weights."""
        members = [member for member in members if member.spec.vector == 1]
        sample = trials(members, self.rows)
        if not sample:
            return None
        found = self._search(sample, _Magnitudes.of(members, channels))
        every = trials(members)
        return found if cost(every, found) < cost(every, torch.ones_like(found)) else None

    def _search(self, sample: Sequence[Trial], magnitudes: "_Magnitudes") -> Tensor:
        """The best scale of the grid, or what descent makes of it."""
        candidates = [s for i in range(self.exponents) for s in magnitudes.scales(i / self.exponents)]
        costs = [cost(sample, scale) for scale in candidates]
        least = min(costs)
        best = candidates[costs.index(least)]
        if not self.descent or any(one.spec.rows != 1 for one in sample):
            return best
        further = bounded(descended(sample, best), magnitudes.is_alive)
        return further if cost(sample, further) < least else best

    def clip(self, member: Member) -> Tensor:
        """See `ptqc.transforms.Transform`. Only where a group of one row has a plain scale of its own."""
        spec = member.spec
        if not self.clipping or spec.vector != 1 or spec.rows != 1 or spec.scale.bits is not None:
            return member.weight
        out_features, in_features = member.weight.shape[-2:]
        weights = member.weight.reshape(-1, out_features, in_features)
        hessians = member.statistics["hessian"].reshape(-1, in_features, in_features).expand(len(weights), -1, -1)
        shares = [1 - (1 - self.narrowest) * (i + 1) / self.shares for i in range(self.shares)]
        made = [clipped(weight, hessian, spec, shares) for weight, hessian in zip(weights, hessians, strict=True)]
        return torch.stack(made).view(member.weight.shape)


@dataclass(frozen=True, eq=False)
class _Magnitudes:
    """Of every channel: x, the mean magnitude of the input; w, that of the weights relative to their groups."""

    x: Tensor
    w: Tensor

    @staticmethod
    def of(members: Sequence[Member], channels: int) -> "_Magnitudes":
        columns = [(_over_lead(member, member.statistics["mean_abs"]), channels_of(member)) for member in members]
        weights = [(_over_lead(member, _relative(member)), channels_of(member)) for member in members]
        return _Magnitudes(averaged(columns, channels), averaged(weights, channels))

    @property
    def is_alive(self) -> Tensor:
        """Channels whose input is not always zero."""
        return self.x > 0

    def scales(self, exponent: float) -> list[Tensor]:
        """The scales [channels] of one exponent."""
        by_input = self.x.pow(exponent)
        return [bounded(by_input / w, self.is_alive) for w in (1, self.w.clamp_min(1e-4).pow(1 - exponent))]


def _relative(member: Member) -> Tensor:
    """Mean over the rows of |w| relative to the largest of its group, [*lead, in]."""
    if member.spec.rows != 1:
        magnitude = member.weight.abs()
        return (magnitude / magnitude.amax((-1, -2), keepdim=True).clamp_min(1e-30)).mean(-2)
    groups = grid.tiles(member.weight, member.spec).abs()
    return (groups / groups.amax(-1, keepdim=True).clamp_min(1e-30)).flatten(-2).mean(-2)


def _over_lead(member: Member, values: Tensor) -> Tensor:
    """The mean of [*lead, in] over a stack, weighted by how often each of it was used: [in]."""
    flat = values.reshape(-1, values.shape[-1])
    counts = member.statistics.get("count", torch.ones(())).to(flat).flatten().expand(len(flat))
    return (flat * counts.unsqueeze(-1)).nan_to_num().sum(0) / counts.sum().clamp_min(1)
