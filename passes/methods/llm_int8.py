"""LLM.int8(): W8A8 whose outlier channels stay in floating point.

Dettmers, Lewis, Belkada and Zettlemoyer 2022, LLM.int8(), arXiv:2208.07339. Weights have one symmetric scale per output
channel, inputs one per token. Channels where an input is larger than the threshold are taken out of the integer
product and multiplied in floating point with the dequantized weights: few channels, the same for nearly all tokens,
hold values so large that they would leave the others of a token two or three levels.
"""

import math
from dataclasses import dataclass

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.methods import METHODS
from ptqc.passes.methods.int8 import Int8

__all__ = ["LlmInt8"]


@METHODS.register("llm_int8")
@dataclass(frozen=True)
class LlmInt8(Int8):
    """LLM.int8(). threshold: magnitude above which a channel of the input stays in floating point."""

    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise SpecError(f"llm_int8 needs a positive threshold of outliers (the paper has 6), not {self.threshold}")

    @property
    def activation(self) -> ActSpec:
        """What its linears do to their inputs."""
        return ActSpec(dtype="int8", outlier=float(self.threshold))
