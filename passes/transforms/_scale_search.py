"""What a scale costs: the output error of weights that are rounded to nearest behind it.

For a weight W [out, in] whose input has the second moment H = mean(x xT), and factors s of its columns,

    cost(s) = tr(E H ET),    E = Q(W diag(s)) diag(1/s) - W,

which is the mean squared error of the output over the whole of the calibration data, not a sample of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqc import grid
from ptqc.groups import spread
from ptqc.passes.methods.rtn import round_to_nearest
from ptqc.passes.transforms._channels import channels_of
from ptqc.spec import WeightSpec
from ptqc.transforms import Member

__all__ = ["Trial", "cost", "descended", "rounded", "trials"]

_ROWS_AT_ONCE = 2048
_STEPS, _STRIDE = 40, 0.1
"""Steps of `descended`, and the largest of them in the logarithm of a scale. With twice or half the stride, or 100
steps, the expected cost ends within 0.1% (reference model, 3 bits)."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A weight to try scales on. weight: [rows, in], a sample of its rows. hessian: [in, in]. channel: [in].

    share: what an error of one of these rows counts for.
    """

    weight: Tensor
    hessian: Tensor
    channel: Tensor
    spec: WeightSpec
    share: float


def trials(members: Sequence[Member], rows: int | None = None) -> list[Trial]:
    """The matrices of the members, those of stacks one by one; inputs that were seen more often count for more.

    rows: how many of a member's rows to take, evenly spaced (at least 16 of a matrix); None takes all. Specs with
    blocks of rows always take all.
    """
    return [trial for member in members for trial in _trials(member, rows)]


def _trials(member: Member, rows: int | None) -> Iterator[Trial]:
    out_features, in_features = member.weight.shape[-2:]
    weight = member.weight.reshape(-1, out_features, in_features)
    hessian = member.statistics["hessian"].reshape(-1, in_features, in_features).expand(len(weight), -1, -1)
    counts = member.statistics.get("count", torch.ones(())).flatten().expand(len(weight)).tolist()
    taken = out_features
    if rows is not None and member.spec.rows == 1:
        taken = min(out_features, max(16, rows // len(weight)))
    index = torch.arange(taken, device=weight.device) * out_features // taken
    for matrix, moment, count in zip(weight, hessian, counts, strict=True):
        if count > 0:
            yield Trial(matrix[index], moment, channels_of(member), member.spec, count * out_features / taken)


def rounded(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The numbers that a weight [rows, in] becomes when it is rounded to nearest."""
    return grid.reconstruct(round_to_nearest(weight, spec), spec)


def cost(matrices: Sequence[Trial], scale: Tensor) -> float:
    """The output error with a scale [channels]; infinite where the spec cannot hold the scaled weights."""
    total = sum(one.share * _error(one, spread(scale, one.channel)) for one in matrices)
    return total if total < float("inf") else float("inf")  # NaN is infinite as well


def _error(trial: Trial, factor: Tensor) -> float:
    at_once = _ROWS_AT_ONCE if trial.spec.rows == 1 else len(trial.weight)
    total = 0.0
    for weight in trial.weight.split(at_once):
        error = rounded(weight * factor, trial.spec) / factor - weight
        total += float(torch.linalg.vecdot(error @ trial.hessian, error).double().sum())
    return total


# -------------------------------------------------------------------- descent


def descended(matrices: Sequence[Trial], scale: Tensor) -> Tensor:
    """The scale [channels] of least expected cost, from a scale to start at.

    Rounding errors are nearly uniform and independent of each other, so that a group g of row o with the range r adds
    r^2 / (12 levels^2) sum_j H_jj / s_j^2 to the expected cost. Ranges are maxima of w_j s_j: the whole is convex in
    log s, and descent finds its one minimum. A larger s_j lowers the sum, but widens the ranges in which column j is
    an extreme; each channel moves by the relative difference of the two effects, by less and less.
    """
    for step in range(_STEPS):
        gain, loss = torch.zeros_like(scale), torch.zeros_like(scale)
        for one in matrices:
            has = one.channel >= 0
            for total, by_column in zip((gain, loss), _slopes(one, spread(scale, one.channel)), strict=True):
                total.index_add_(0, one.channel[has], by_column[has])
        direction = (gain - loss) / (gain + loss).clamp_min(torch.finfo(gain.dtype).tiny)
        scale = scale * (direction * (_STRIDE * (1 - step / _STEPS))).exp()
    return scale


def _slopes(trial: Trial, factor: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the cost falls, and by how much it rises, per relative increase of each factor; both [in]."""
    group = trial.spec.group or len(factor)
    noise = (trial.hessian.diagonal() / factor.square()).unflatten(0, (-1, group))
    groups = (trial.weight * factor).unflatten(-1, (-1, group))
    (high, at_high), (low, at_low) = groups.max(-1), groups.min(-1)
    high, low = high.clamp_min(0), low.clamp_max(0)
    if trial.spec.is_symmetric:
        is_high = high >= -low
        high, low = high * is_high, low * ~is_high
    width = high - low
    gain = noise * width.square().sum(0).unsqueeze(-1)
    loss = torch.zeros_like(gain).mT.contiguous()
    pull = trial.share * width * noise.sum(-1)
    loss.scatter_add_(0, at_high, pull * high)
    loss.scatter_add_(0, at_low, pull * -low)
    return trial.share * gain.flatten(), loss.mT.flatten()
