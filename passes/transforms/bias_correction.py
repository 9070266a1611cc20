"""Bias correction: take the mean of the output error that quantization causes out of the bias.

Nagel, van Baalen, Blankevoort, Welling 2019, arXiv:1906.04721, section 4.2. With E = stored - W,

    E[stored x] - E[W x] = E E[x],

so that -E mean(x) is added to the bias. The mean of x is measured on calibration data (the paper derives it from batch
normalisation where it can).
"""

from dataclasses import dataclass

from torch import Tensor

from ptqc.transforms import TRANSFORMS, Member, Transform

__all__ = ["BiasCorrection"]


@TRANSFORMS.register("bias_correction")
@dataclass(frozen=True)
class BiasCorrection(Transform):
    """Adds to each bias what quantizing its weight takes away on average."""

    @property
    def needs(self) -> frozenset[str]:
        """The mean of the input."""
        return frozenset({"mean"})

    def correct(self, member: Member, stored: Tensor) -> Tensor | None:
        """See `ptqc.transforms.Transform`."""
        error = (stored - member.weight).float()
        change: Tensor = -(error @ member.statistics["mean"].to(error.device, error.dtype).unsqueeze(-1)).squeeze(-1)
        return change
