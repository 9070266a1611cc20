"""SmoothQuant: outliers of the input move into the weight, until both are as hard to quantize.

Xiao, Lin, Seznec, Wu, Demouth, Han 2023, arXiv:2211.10438, section 4, equation 4. For channel j of a value X and the
weights W that read it,

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha);    the input is divided by s_j, the columns are multiplied by it.

alpha is 0.5 in the paper, 0.8 or so for models with larger outliers; "search" takes for every group the alpha (0 to 1)
whose output is nearest to the float one on a sample of the inputs, both sides quantized as they will be.

Where we differ: s is scaled to the geometric mean 1 (a common factor changes nothing but the range of float16), and
channels of the input or the weight that are all zeros keep s = 1. Groups whose inputs stay in floating point are left
alone, and so are those whose output on the sample is further from the float one with s than without (`is_held`): where
weights have few bits, or inputs no outliers, the weight loses more than the input gains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.activations import fake_quantize, static_scale
from ptqc.errors import PtqcError
from ptqc.groups import spread
from ptqc.passes.transforms._channels import bounded, channels_of, largest
from ptqc.passes.transforms._scale_search import rounded
from ptqc.transforms import TRANSFORMS, Member, Transform

__all__ = ["SmoothQuant"]

_ALPHAS = tuple(i / 20 for i in range(21))


@TRANSFORMS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """Migrates outliers from inputs to weights.

    alpha: 0 leaves it all to the input, 1 to the weight; or "search". is_held: a given alpha is used only where it
    helps; False uses it in every group, as the paper does.
    """

    alpha: float | Literal["search"] = 0.5
    is_held: bool = True

    default_method: ClassVar[str] = "w8a8"

    def __post_init__(self) -> None:
        if self.alpha == "search" or (not isinstance(self.alpha, str) and 0 <= self.alpha <= 1):
            return
        raise PtqcError(f'alpha of smoothquant lies between 0 and 1, or is "search"; it cannot be {self.alpha!r}')

    @property
    def needs(self) -> frozenset[str]:
        """The largest magnitudes of the input, and a sample of it to try scales on."""
        return frozenset({"absmax", "rows", "count"} if self._tries else {"absmax"})

    @property
    def _tries(self) -> bool:
        return self.alpha == "search" or self.is_held

    def refuses(self, members: Sequence[Member]) -> str | None:
        """See `ptqc.transforms.Transform`."""
        if any(member.act.dtype is not None for member in members):
            return None
        return 'inputs that stay in floating point need no smoothing; activation="int8-token" quantizes them'

    def scale(self, members: Sequence[Member], channels: int) -> Tensor | None:
        """See `ptqc.transforms.Transform`."""
        alphas = _ALPHAS if self.alpha == "search" else (float(self.alpha),)
        smoothings = [_smoothing(members, channels, alpha) for alpha in alphas]
        searched = [member for member in members if member.spec.vector == 1]
        if not self._tries or (not searched and self.alpha != "search"):
            return smoothings[0]
        if not searched:
            return None
        candidates = [torch.ones(channels, device=members[0].weight.device), *smoothings]
        errors = [sum(_output_error(member, scale) for member in searched) for scale in candidates]
        best = min(range(len(errors)), key=lambda i: errors[i] if errors[i] == errors[i] else float("inf"))
        return candidates[best] if best else None


def _smoothing(members: Sequence[Member], channels: int, alpha: float) -> Tensor:
    """Equation 4, [channels]."""
    inputs = [(_largest(member.statistics["absmax"]), channels_of(member)) for member in members]
    weights = [(_largest(member.weight.abs()), channels_of(member)) for member in members]
    x, w = largest(inputs, channels), largest(weights, channels)
    return bounded(x.pow(alpha) / w.pow(1 - alpha), (x > 0) & (w > 0))


def _largest(values: Tensor) -> Tensor:
    """The maximum over all axes but the last: [in]."""
    return values.reshape(-1, values.shape[-1]).amax(0)


def _output_error(member: Member, scale: Tensor) -> float:
    """Squared error of the output on the sample of rows, weight and input quantized behind a scale [channels]."""
    factor = spread(scale, channels_of(member))
    out_features, in_features = member.weight.shape[-2:]
    weights = member.weight.reshape(-1, out_features, in_features)
    samples = member.statistics["rows"]
    samples = samples.reshape(-1, *samples.shape[-2:]).expand(len(weights), -1, -1)
    ranges = member.statistics["absmax"].reshape(-1, in_features).expand(len(weights), -1)
    counts = member.statistics.get("count", torch.ones(())).flatten().expand(len(weights)).tolist()
    total = 0.0
    for weight, rows, absmax, count in zip(weights, samples, ranges, counts, strict=True):
        if count > 0:
            made = _quantized(rows / factor, absmax / factor, member.act) @ rounded(weight * factor, member.spec).mT
            total += count * float((made - rows @ weight.mT).square().mean(0).sum())
    return total


def _quantized(rows: Tensor, absmax: Tensor, act: ActSpec) -> Tensor:
    if act.dtype is None:
        return rows
    return fake_quantize(rows, act, static_scale(absmax, act) if act.is_static else None)
