"""Hadamard rotations: random signs and a Hadamard matrix before a weight, or on both of its sides, make it incoherent.

Tseng, Chee, Sun, Kuleshov, De Sa 2024, QuIP#, arXiv:2402.04396, section 3 (both sides); Ashkboos et al. 2024, QuaRot,
arXiv:2404.00456 (inputs). With R = H diag(signs), orthogonal, and O alike for the outputs,

    y = W x = O^T (O W R^T) (R x),

and O W R^T has entries as if drawn from one Gaussian: no outliers, neither in the weight nor in R x. The matrix in the
brackets is stored; R (and O^T) run with the model.

Where we differ: sizes without a Hadamard matrix take the products of `ptqc.hadamard`; nothing is folded into
neighbours (QuaRot), so that any graph will do; weights of one input size share the signs of the input side, so that
weights that read one value share one rotation of it.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ptqc.errors import PtqcError
from ptqc.hadamard import rotation_name
from ptqc.surroundings import Surroundings
from ptqc.transforms import TRANSFORMS, Member, Transform

__all__ = ["Hadamard"]


@TRANSFORMS.register("hadamard")
@dataclass(frozen=True)
class Hadamard(Transform):
    """Random Hadamard rotations. sides: "input", or "both" for outputs as well. seed: of the signs."""

    sides: Literal["input", "both"] = "input"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sides not in ("input", "both"):
            raise PtqcError(f'hadamard rotates the sides "input" or "both", not {self.sides!r}')

    def around(self, member: Member) -> tuple[Surroundings, dict[str, Tensor]]:
        """See `ptqc.transforms.Transform`."""
        out_features, in_features = member.weight.shape[-2:]
        device = member.weight.device
        extras = {"input_signs": _signs(in_features, f"{self.seed} {in_features}").to(device)}
        if self.sides == "input":
            return Surroundings(input_rotation=rotation_name(in_features)), extras
        extras["output_signs"] = _signs(out_features, f"{self.seed} {member.name}").to(device)
        return Surroundings(
            input_rotation=rotation_name(in_features), output_rotation=rotation_name(out_features)
        ), extras  # fmt: skip


def _signs(count: int, seed: str) -> Tensor:
    """Random signs [count] int8: the bits of SHAKE-256 of the seed, the same on every machine and version."""
    drawn = torch.frombuffer(bytearray(hashlib.shake_256(seed.encode()).digest(count)), dtype=torch.uint8)
    return 1 - 2 * (drawn & 1).to(torch.int8)
