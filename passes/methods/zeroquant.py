"""ZeroQuant: group-wise weights, token-wise inputs, and a distillation of each layer.

Yao et al. 2022, ZeroQuant, arXiv:2206.01861. Weights are symmetric integers under a scale per group, inputs eight-bit
ones under a scale per token. Layer-by-layer knowledge distillation (LKD, section 4.3) trains a quantized layer to give
the outputs of the float one on the same inputs. Here the layer is one weight W, and with G = x'x of a sample of inputs

    minimise  tr((Q - W) G (Q - W)'),  Q = s clamp(round(v))

by Adam over the scales s and the weights v, in units of them: gradients pass the rounding unchanged, and reach the
scales as in LSQ (Esser et al. 2020, arXiv:1902.08153). The best codes seen are kept, so it never does worse than
rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqc import grid, storage
from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.methods import METHODS, whole_row
from ptqc.passes.methods.rtn import round_to_nearest
from ptqc.spec import WeightSpec

__all__ = ["ZeroQuant"]

_RATE = 0.05
"""Of Adam, in units of a scale; it falls to zero over the steps."""


@METHODS.register("zeroquant")
@dataclass(frozen=True)
class ZeroQuant:
    """ZeroQuant. distill: steps of distillation for each weight; 0 rounds to nearest and takes no data."""

    distill: int = 0

    def __post_init__(self) -> None:
        if self.distill < 0:
            raise SpecError(f"zeroquant distills for 0 steps or more, not {self.distill}")

    @property
    def needs(self) -> frozenset[str]:
        """A sample of the inputs, where they are used."""
        return frozenset({"rows"} if self.distill else ())

    @property
    def activation(self) -> ActSpec:
        """What its linears do to their inputs."""
        return ActSpec(dtype="int8")

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        """8 bits in groups of 64 unless asked otherwise."""
        return WeightSpec.integer(8 if bits is None else bits, whole_row(group, 64))

    def refuses(self, spec: WeightSpec) -> str | None:
        """Everything but symmetric integers with float scales for single rows."""
        if spec.book is None and spec.is_symmetric and spec.rows == 1 and spec.scale.bits is None:
            return None
        return (
            f"zeroquant stores symmetric integers in groups, not {spec}; use rtn for that, or a spec as {self.spec()}"
        )

    def choose(self, weight: Tensor, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
        """See `ptqc.methods.Method`."""
        rounded = round_to_nearest(weight, spec)
        if not self.distill:
            return rounded
        rows = statistics["rows"]
        return _distilled(weight, rounded.scale, rows.mT @ rows / max(rows.shape[-2], 1), spec, self.distill)


def _distilled(weight: Tensor, scale: Tensor, gram: Tensor, spec: WeightSpec, steps: int) -> storage.Codes:
    """The best codes of `steps` of Adam. scale: [..., out, groups], where it begins. gram: [..., in, in]."""
    half = 2 ** (spec.bits - 1)
    scale = storage.round_scale(scale, spec)
    scale = torch.where(scale == 0, 1.0, scale)  # groups of zeros, which stay so
    units = grid.tiles(weight, spec) / scale[..., None]
    growth = torch.zeros_like(scale)
    adam = torch.optim.Adam([units, growth], lr=_RATE)
    best = torch.full(weight.shape[:-1], torch.inf)
    kept = scale
    kept_units = units.clone()
    for step in range(steps + 1):
        present = storage.round_scale(scale * growth.exp(), spec)[..., None]
        level = units.round().clamp_(-half, half - 1)
        error = grid.untile(level * present, spec, weight.shape) - weight
        slope = error @ gram
        loss = (slope * error).sum(-1)
        is_better = loss < best
        best = torch.where(is_better, loss, best)
        kept = torch.where(is_better[..., None], present[..., 0], kept)
        kept_units = torch.where(is_better[..., None, None], level, kept_units)
        slopes = grid.tiles(slope, spec) * present
        is_inside = (units > -half - 0.5) & (units < half - 0.5)
        units.grad = slopes * is_inside
        growth.grad = (slopes * (level - units * is_inside)).sum(-1)
        adam.param_groups[0]["lr"] = _RATE * (1 - step / (steps + 1))
        adam.step()
    numbers = grid.untile(kept_units * kept[..., None], spec, weight.shape)
    return storage.Codes(grid.choose_codes(numbers, kept, None, spec), kept)
