"""Products with stored weights: operators of `ptqc::` on the parts, with what is done around the matrix."""

from typing import Any

import torch
from torch import Tensor

from ptqc import ops
from ptqc.qtensor.rules import rule
from ptqc.qtensor.tensor import QuantTensor
from ptqc.surroundings import apply, steps_after, steps_before

_aten = torch.ops.aten


def _same_dtype(x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype:
        raise RuntimeError(
            f"expected the input and the quantized weight to have one dtype: {x.dtype} != {weight.dtype}"
        )


def _product(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    """x @ W.T + bias, with what is done around W."""
    _same_dtype(x, weight)
    parts, spec = list(weight.parts.values()), str(weight.spec)
    if weight.surroundings.is_trivial:
        plain: Tensor = ops.linear(x, parts, spec, bias)
        return plain
    x = apply(steps_before(weight.surroundings, weight.extras, x.dtype), x)
    after = steps_after(weight.surroundings, weight.extras)
    if not after:
        return apply((), ops.linear(x, parts, spec, bias))
    product = apply(after, ops.linear(x, parts, spec, None))
    return product if bias is None else product + bias


@rule(_aten.linear.default)
def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, QuantTensor) or isinstance(bias, QuantTensor) or weight.is_transposed or weight.ndim != 2:
        return NotImplemented
    return _product(x, weight, bias)


@rule(_aten.mm.default)
def _mm(x: Any, weight: Any) -> Any:
    if isinstance(x, QuantTensor) or not weight.is_transposed:
        return NotImplemented
    return _product(x, weight, None)


@rule(_aten.addmm.default)
def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if (
        isinstance(bias, QuantTensor)
        or bias.ndim != 1
        or not isinstance(weight, QuantTensor)
        or (beta, alpha) != (1, 1)
    ):
        return NotImplemented
    if isinstance(x, QuantTensor) or not weight.is_transposed:
        return NotImplemented
    return _product(x, weight, bias)


@rule(_aten.bmm.default)
def _bmm(x: Any, weight: Any) -> Any:
    if isinstance(x, QuantTensor) or not weight.is_transposed:
        return NotImplemented
    _same_dtype(x, weight)
    x = apply(steps_before(weight.surroundings, weight.extras, x.dtype), x)
    return apply(
        steps_after(weight.surroundings, weight.extras), ops.bmm(x, list(weight.parts.values()), str(weight.spec))
    )


@rule(_aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
def _grouped(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows sorted by expert: only experts that have rows are decoded, one at a time. Not while a graph is traced, and
    not on GPUs, which would have to wait for the offsets."""
    if not isinstance(weight, QuantTensor) or weight.ndim != 3 or x.ndim != 2 or not weight.is_transposed:
        return NotImplemented
    if type(offs) is not Tensor or offs.device.type != "cpu" or bias is not None or out_dtype is not None:
        return NotImplemented
    _same_dtype(x, weight)
    made, start = x.new_zeros(x.shape[0], weight.shape[-1]), 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            made[start:end] = _product(_aten.slice.Tensor(x, 0, start, end), _aten.select.int(weight, 0, expert), None)
            start = end
    return made


@rule(_aten.embedding.default)
def _embedding(weight: Any, ids: Any, *_: Any, **__: Any) -> Any:
    if not isinstance(weight, QuantTensor) or weight.is_transposed or not weight.surroundings.keeps_weight:
        return NotImplemented
    return ops.embedding(ids, list(weight.parts.values()), str(weight.spec), list(weight.stored_shape), weight.dtype)
