"""FP8 weights: E4M3 floats (Micikevicius et al. 2022, arXiv:2209.05433) under one scale per channel, tensor or block.

The largest weight that shares a scale becomes 448, the largest E4M3 number; the scales are float32. Inputs may be E4M3
too (W8A8).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.methods import METHODS
from ptqc.passes.methods._preset import Inputs, Preset, in_groups, quantized_inputs

__all__ = ["Float8"]

_GRANULARITIES = {"channel": "", "tensor": "t", "block": "b128x128"}


@METHODS.register("fp8")
@dataclass(frozen=True)
class Float8(Preset):
    """E4M3. granularity: one scale per output channel, for the tensor, or per block of 128 by 128.

    inputs: quantized to E4M3 as well, with a dynamic scale per "token" or "tensor", or a "static" one.
    """

    granularity: Literal["channel", "tensor", "block"] = "channel"
    inputs: Inputs = "float"

    codes: ClassVar[str] = "fp8e4m3"
    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.granularity not in _GRANULARITIES:
            raise SpecError(f"fp8 has no granularity {self.granularity!r}; use {', '.join(_GRANULARITIES)}")
        quantized_inputs(self.inputs, "fp8e4m3")

    @property
    def activation(self) -> ActSpec:
        """What its linears do to their inputs."""
        return quantized_inputs(self.inputs, "fp8e4m3")

    def stores(self, group: int | None) -> str:
        """fp8e4m3, fp8e4m3t or fp8e4m3b128x128.

        Raises: SpecError if a group is asked for as well as a tensor or a block.
        """
        if group not in (None, -1) and self.granularity != "channel":
            raise SpecError(f"fp8 per {self.granularity} has no groups of {group}; use granularity channel for groups")
        return f"{self.codes}{in_groups(group, None)}{_GRANULARITIES[self.granularity]}"
