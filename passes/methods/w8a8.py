"""W8A8: eight-bit integers for weights and inputs alike, so that products run in integers.

Weights have one symmetric scale per output channel. Inputs have one per token, computed as they come, or a single one
for all of them that was calibrated: faster, and as wide as the largest input ever seen (`smoothquant` narrows it).
"""

from dataclasses import dataclass
from typing import Literal

from ptqc.act_spec import ActSpec
from ptqc.methods import METHODS
from ptqc.passes.methods._preset import quantized_inputs
from ptqc.passes.methods.int8 import Int8

__all__ = ["W8A8"]


@METHODS.register("w8a8")
@dataclass(frozen=True)
class W8A8(Int8):
    """INT8 weights and inputs. inputs: a dynamic scale per "token" or "tensor", or a "static" one."""

    inputs: Literal["token", "tensor", "static"] = "token"

    def __post_init__(self) -> None:
        quantized_inputs(self.inputs, "int8")

    @property
    def activation(self) -> ActSpec:
        """What its linears do to their inputs."""
        return quantized_inputs(self.inputs, "int8")
