"""Copies of stored weights in other memory, what is like them, and whether two are equal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptqc.errors import PtqcError
from ptqc.qtensor.rules import rule
from ptqc.qtensor.tensor import QuantTensor

_aten = torch.ops.aten


@rule(_aten.clone.default)
def _clone(weight: QuantTensor, **_: Any) -> QuantTensor:
    return weight.each(torch.clone)


@rule(_aten._to_copy.default)
def _to_copy(weight: QuantTensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    kwargs.pop("memory_format", None)
    return weight.each(lambda part: _aten._to_copy.default(part, **kwargs), dtype=dtype or weight.dtype)


@rule(_aten.copy_.default)
def _copy_(weight: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(weight, QuantTensor):
        return NotImplemented
    if not isinstance(source, QuantTensor) or _kind(source) != _kind(weight):
        raise PtqcError(
            f"cannot copy {source!r} into {weight!r}: they must have one spec and shape and surroundings; "
            "quantize the source alike, or replace the parameter (load_state_dict(..., assign=True))"
        )
    weight.forget_kernels()
    given = source.tensors
    for name, tensor in weight.tensors.items():
        tensor.copy_(given[name], non_blocking)
    return weight


def _kind(weight: QuantTensor) -> tuple[object, ...]:
    return weight.spec, weight.shape, weight.surroundings


@rule(_aten.is_pinned.default)
def _is_pinned(weight: QuantTensor, device: Any = None) -> bool:
    return all(tensor.is_pinned() for tensor in (weight.slots | weight.extras).values())


@rule(_aten._pin_memory.default)
def _pin_memory(weight: QuantTensor, device: Any = None) -> QuantTensor:
    return weight.each(lambda part: part.pin_memory())


@rule(_aten.equal.default)
def _equal(a: Any, b: Any) -> Any:
    if not (isinstance(a, QuantTensor) and isinstance(b, QuantTensor)) or _kind(a) != _kind(b):
        return NotImplemented
    others = b.tensors
    return all(torch.equal(tensor, others[name]) for name, tensor in a.tensors.items())


def _like(func: Any) -> Callable[..., Any]:
    def make(weight: QuantTensor, *args: Any, **kwargs: Any) -> Tensor:
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        kwargs.setdefault("device", weight.device)
        made: Tensor = func(empty, *args, **(kwargs | {"device": kwargs["device"] or weight.device}))
        return made

    return make


for _operator in (_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default):
    rule(_operator)(_like(_operator))
