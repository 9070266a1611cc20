"""FP4: four-bit floats (a sign, two exponent bits, a mantissa bit) under the largest magnitude of each block.

Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, QLoRA, arXiv:2305.14314. Bit for bit what bitsandbytes stores
(0.50.2, on a CPU). NF4 has the smaller error on weights that are nearly normal, which trained weights are.
"""

from dataclasses import dataclass
from typing import ClassVar

from ptqc.methods import METHODS
from ptqc.passes.methods._preset import Preset, in_groups

__all__ = ["FloatingPoint4"]


@METHODS.register("fp4")
@dataclass(frozen=True)
class FloatingPoint4(Preset):
    """FP4 in blocks of 64. double_quant: store the block maxima in 8 bits, 0.37 bits per weight less."""

    double_quant: bool = False

    codes: ClassVar[str] = "fp4"
    bits: ClassVar[int] = 4

    def stores(self, group: int | None) -> str:
        """fp4g64, or fp4g64dq."""
        return f"fp4{in_groups(group, 64)}{'dq' if self.double_quant else ''}"
