"""Fusions: what a kernel may do to its input and to its result, besides the product.

Each has a name, says whether it takes an operand and of which shape, and has a reference in plain torch, which the
kernels are held against. A name may carry a number behind a colon: "rms_norm:1e-06".

    prologue   scale         x * s, s [in]                     order    x[:, o], o [in] int32
               rms_norm:eps  x / rms(x) * s, s [in]
    epilogue   bias          y + b, b [out]                    scale    y * s, s [out]
               add, mul      y + z, y * z, z [rows, out]       silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh
               gate_silu, gate_gelu, gate_gelu_tanh, gate_relu, gate_sigmoid    act(y[:, :out/2]) * y[:, out/2:]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "EPILOGUES", "PROLOGUES", "Fusion", "apply_fusions", "fusion", "narrows", "takes_operand"]


@dataclass(frozen=True, slots=True)
class Fusion:
    """One step of a chain. operand: None, a vector over the features, or a matrix [rows, features].

    reference: (value, operand or None, number behind the colon or None) -> value, in float32.
    """

    operand: Literal["vector", "matrix"] | None
    reference: Callable[[Tensor, Tensor | None, float | None], Tensor]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda y: functional.relu(y).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _with(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor | None, float | None], Tensor]:
    def reference(value: Tensor, operand: Tensor | None, number: float | None) -> Tensor:
        assert operand is not None
        return function(value, operand if operand.dtype == torch.int32 else operand.to(value.dtype))

    return reference


def _alone(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor | None, float | None], Tensor]:
    return lambda value, operand, number: function(value)


def _gated(activation: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    gate, up = value.chunk(2, -1)
    return activation(gate) * up


def _rms_norm(value: Tensor, gain: Tensor | None, eps: float | None) -> Tensor:
    assert gain is not None and eps is not None
    return functional.rms_norm(value, (value.shape[-1],), gain.to(value.dtype), eps)


PROLOGUES: dict[str, Fusion] = {
    "scale": Fusion("vector", _with(torch.mul)),
    "order": Fusion("vector", _with(lambda x, order: x.index_select(-1, order))),
    "rms_norm": Fusion("vector", _rms_norm),
}
EPILOGUES: dict[str, Fusion] = {
    "bias": Fusion("vector", _with(torch.add)),
    "scale": Fusion("vector", _with(torch.mul)),
    "add": Fusion("matrix", _with(torch.add)),
    "mul": Fusion("matrix", _with(torch.mul)),
    **{name: Fusion(None, _alone(function)) for name, function in ACTIVATIONS.items()},
    **{f"gate_{name}": Fusion(None, _alone(partial(_gated, function))) for name, function in ACTIVATIONS.items()},
}


def fusion(name: str) -> Fusion:
    """The fusion that a name stands for, its number left aside. Raises: KeyError if there is none."""
    bare = name.partition(":")[0]
    return EPILOGUES[bare] if bare in EPILOGUES else PROLOGUES[bare]


def takes_operand(name: str) -> bool:
    """True if the kernel gets a tensor for this step."""
    return fusion(name).operand is not None


def narrows(name: str) -> bool:
    """True for gates, which leave half of the features."""
    return name.startswith("gate_")


def apply_fusions(names: Sequence[str], value: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """The reference: run a chain on a value [rows, features], in the dtype of the value."""
    rest = list(operands)
    for name in names:
        step, number = fusion(name), name.partition(":")[2]
        operand = rest.pop(0) if step.operand else None
        value = step.reference(value, operand, float(number) if number else None)
    return value
