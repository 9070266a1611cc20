"""INT8: eight-bit integers with one symmetric scale per output channel."""

from dataclasses import dataclass
from typing import ClassVar

from ptqc.methods import METHODS
from ptqc.passes.methods._preset import Preset, in_groups

__all__ = ["Int8"]


@METHODS.register("int8")
@dataclass(frozen=True)
class Int8(Preset):
    """Symmetric 8-bit integers, one scale per output channel (per group if one is asked for)."""

    codes: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8

    def stores(self, group: int | None) -> str:
        """int8."""
        return f"int8{in_groups(group, None)}"
