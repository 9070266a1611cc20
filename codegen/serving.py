"""Serving packs: weights that serving engines store as one matrix, and what must be the same in all of them.

vLLM and SGLang concatenate the matrices of these modules of one parent along `out` when they load a folder. The names
are theirs; modules of other names are never merged. What is stored per weight and per input must then agree: one spec,
one treatment of inputs, one order of inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings

__all__ = ["PACKS", "Kind", "disagreements", "kind_of"]

PACKS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
"""Names of modules that are merged, beside each other in one parent."""


@dataclass(frozen=True, eq=False)
class Kind:
    """How a weight is stored; None for spec and surroundings in floating point. order: of its inputs."""

    spec: WeightSpec | None
    surroundings: Surroundings | None
    order: Tensor | None = None

    def agrees(self, other: "Kind") -> bool:
        """Whether both can be stored as one matrix."""
        if (self.spec, self.surroundings) != (other.spec, other.surroundings):
            return False
        orders = (self.order, other.order)
        return all(order is None for order in orders) or (
            all(order is not None for order in orders) and torch.equal(*orders)  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        if self.spec is None or self.surroundings is None:
            return "floating point"
        inputs = "" if self.surroundings.act.dtype is None else f" with inputs in {self.surroundings.act}"
        return f"{self.spec}{inputs}{' in an order of its own' if self.surroundings.order else ''}"


def kind_of(weight: Tensor, order: Tensor | None) -> Kind:
    """The kind of a weight, perhaps only described. order: of the inputs of a quantized one, where there is one."""
    if not isinstance(weight, QuantTensor):
        return Kind(None, None)
    return Kind(weight.spec, weight.surroundings, order)


def disagreements(kinds: Mapping[str, Kind]) -> list[str]:
    """What is wrong with the packs among weights of these names; nothing if engines can merge all of them."""
    found = []
    for name, kind in kinds.items():
        parent, _, module = name.removesuffix(".weight").rpartition(".")
        pack = next((pack for pack in PACKS if pack[0] == module), ())
        for other in pack[1:]:
            beside = kinds.get(f"{parent}.{other}.weight" if parent else f"{other}.weight")
            if beside is not None and not kind.agrees(beside):
                found.append(f"{parent}: {module} is in {kind}, {other} in {beside}")
    return found
