"""Methods that round to nearest in one family of specs: a table of specs with a name, nothing more."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ptqc import storage
from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.passes.methods.rtn import round_to_nearest
from ptqc.spec import WeightSpec

__all__ = ["Inputs", "Preset", "in_groups", "quantized_inputs"]

Inputs = Literal["float", "token", "tensor", "static"]
"""How the inputs are quantized: not at all; by a scale per token, or for the tensor, computed from the input; by one
that was calibrated."""

_INPUTS: dict[str, ActSpec] = {
    "token": ActSpec(dtype="int8", scale="token"),
    "tensor": ActSpec(dtype="int8", scale="tensor"),
    "static": ActSpec(dtype="int8", scale="tensor", is_static=True),
}


@dataclass(frozen=True)
class Preset(ABC):
    """Rounds to nearest with symmetric codes of one kind. A subclass names them and says which spec it stores."""

    codes: ClassVar[str]
    """What the spec's name begins with: a codebook, or int8."""
    bits: ClassVar[int]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def stores(self, group: int | None) -> str:
        """Name of the spec for a requested group (None: the default, -1: the whole row)."""

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        """The spec of the subclass; it has one width only.

        Raises: SpecError for another.
        """
        if bits not in (None, self.bits):
            raise SpecError(f"{self.codes} has {self.bits} bits, not {bits:g}; for other widths use rtn or hqq")
        return WeightSpec.parse(self.stores(group))

    def refuses(self, spec: WeightSpec) -> str | None:
        """Everything but its own codes."""
        if (spec.codebook or f"int{spec.bits}") == self.codes and spec.is_symmetric:
            return None
        return f"{self.codes} does not choose codes for {spec}; use rtn for that, or a spec such as {self.spec()}"

    def choose(self, weight: Tensor, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
        """See `ptqc.methods.Method`."""
        return round_to_nearest(weight, spec)


def in_groups(group: int | None, default: int | None) -> str:
    """The part of a spec's name that says its group."""
    size = default if group is None else group
    return "" if size is None or size == -1 else f"g{size}"


def quantized_inputs(inputs: Inputs, dtype: Literal["int8", "fp8e4m3"]) -> ActSpec:
    """What a linear does to its inputs.

    Raises: SpecError for a way that is not one of `Inputs`.
    """
    if inputs == "float":
        return ActSpec()
    if inputs not in _INPUTS:
        raise SpecError(f"inputs are not quantized by {inputs!r}; use float, {', '.join(_INPUTS)}")
    return replace(_INPUTS[inputs], dtype=dtype)
