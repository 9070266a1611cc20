"""NF4: sixteen levels at the quantiles of a normal distribution, under the largest magnitude of each block.

Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, QLoRA, arXiv:2305.14314, section 3. Bit for bit what bitsandbytes
stores (0.50.2, on a CPU), with double quantization as well: codes are chosen by the exact block maxima, which are
quantized afterwards.
"""

from dataclasses import dataclass
from typing import ClassVar

from ptqc.methods import METHODS
from ptqc.passes.methods._preset import Preset, in_groups

__all__ = ["NormalFloat4"]


@METHODS.register("nf4")
@dataclass(frozen=True)
class NormalFloat4(Preset):
    """NF4 in blocks of 64. double_quant: store the block maxima in 8 bits, 0.37 bits per weight less."""

    double_quant: bool = False

    codes: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4

    def stores(self, group: int | None) -> str:
        """nf4g64, or nf4g64dq."""
        return f"nf4{in_groups(group, 64)}{'dq' if self.double_quant else ''}"
