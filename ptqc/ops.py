"""The `ptqc::` operators: what a graph calls on a stored weight. Each has a reference implementation, a fake
one for tracing, and a derivative towards the activation.

    ptqc::linear(x, parts, spec, bias)        x [..., in] and W [out, in]        -> x @ W.T + bias
    ptqc::bmm(x, parts, spec)                 x [E, T, in] and W [E, out, in]    -> x @ W.mT
    ptqc::embedding(ids, parts, spec, shape, dtype)   rows of W [rows, width]
    ptqc::dequantize(parts, spec, shape, dtype)       W itself, shape [..., out, in]
    ptqc::restore(prepared, order, part, first, rows)   a part that only a kernel's order of it holds (ptqc.held), or
                                                        some of its rows

and what stands around it (`ptqc.surroundings`):

    ptqc::hadamard(x, name)                   x [..., n] times H.T along the last axis    (ptqc.hadamard)
    ptqc::hadamard_back(x, name)              its inverse
    ptqc::fake_quantize(x, act, scale)        the numbers a quantized input stands for    (ptqc.activations)

`parts` are the tensors of `storage.part_names(spec)`, in that order; `spec` is a short name. The operators are
declared through `torch.library.Library`: a call costs 4 us, against 15 us for `torch.library.custom_op`
(torch 2.13, one core of a Zen 5 EPYC, November 2026).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ptqc import activations, storage, stored_rows
from ptqc import hadamard as rotations
from ptqc.act_spec import ActSpec
from ptqc.held import order_called
from ptqc.spec import WeightSpec

__all__ = ["bmm", "dequantize", "embedding", "fake_quantize", "hadamard", "hadamard_back", "linear", "restore"]

_LIBRARY = torch.library.Library("ptqc", "FRAGMENT")
for _schema in (
    "linear(Tensor x, Tensor[] parts, str spec, Tensor? bias) -> Tensor",
    "bmm(Tensor x, Tensor[] parts, str spec) -> Tensor",
    "embedding(Tensor ids, Tensor[] parts, str spec, SymInt[] shape, ScalarType dtype) -> Tensor",
    "dequantize(Tensor[] parts, str spec, SymInt[] shape, ScalarType dtype) -> Tensor",
    "restore(Tensor[] prepared, str order, str part, int first=0, int? rows=None) -> Tensor",
    "hadamard(Tensor x, str name) -> Tensor",
    "hadamard_back(Tensor x, str name) -> Tensor",
    "fake_quantize(Tensor x, str act, Tensor? scale) -> Tensor",
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)

linear = torch.ops.ptqc.linear.default
bmm = torch.ops.ptqc.bmm.default
embedding = torch.ops.ptqc.embedding.default
dequantize = torch.ops.ptqc.dequantize.default
restore = torch.ops.ptqc.restore.default
hadamard = torch.ops.ptqc.hadamard.default
hadamard_back = torch.ops.ptqc.hadamard_back.default
fake_quantize = torch.ops.ptqc.fake_quantize.default


def _named(parts: Sequence[Tensor], spec: WeightSpec) -> dict[str, Tensor]:
    return dict(zip(storage.part_names(spec), parts, strict=True))


# -------------------------------------------------------------------- reference implementations


def _dequantize(parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    stored_as = WeightSpec.parse(spec)
    return storage.decode(_named(parts, stored_as), stored_as, shape, dtype)


def _linear(x: Tensor, parts: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    weight = _dequantize(parts, spec, (parts[0].shape[0], x.shape[-1]), x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _bmm(x: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    weight = _dequantize(parts, spec, (*parts[0].shape[:-1], x.shape[-1]), x.dtype)
    return torch.bmm(x, weight.mT)


def _embedding(ids: Tensor, parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    stored_as = WeightSpec.parse(spec)
    taken = stored_rows.take(_named(parts, stored_as), stored_as, shape, 0, ids.flatten())
    if taken is None:
        return _dequantize(parts, spec, shape, dtype)[ids]
    rows = storage.decode(*taken, (ids.numel(), shape[1]), dtype)
    return rows.view(*ids.shape, shape[1])


def _restore(prepared: Sequence[Tensor], order: str, part: str, first: int = 0, rows: int | None = None) -> Tensor:
    return order_called(order).of_rows(first, rows).restore(part, prepared)


def _hadamard(x: Tensor, name: str) -> Tensor:
    return _fresh(rotations.rotate(x, name) if x.numel() else x, x)


def _hadamard_back(x: Tensor, name: str) -> Tensor:
    return _fresh(rotations.rotate_back(x, name) if x.numel() else x, x)


def _fake_quantize(x: Tensor, act: str, scale: Tensor | None) -> Tensor:
    treated_as = ActSpec.parse(act)
    return _fresh(x if treated_as.dtype is None else activations.fake_quantize(x, treated_as, scale), x)


def _fresh(result: Tensor, x: Tensor) -> Tensor:
    """What an operator may return: contiguous, and never its input."""
    return result.clone(memory_format=torch.contiguous_format) if result is x else result.contiguous()


# -------------------------------------------------------------------- tracing


def _linear_fake(x: Tensor, parts: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], parts[0].shape[0]))


def _bmm_fake(x: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], parts[0].shape[1]))


def _embedding_fake(
    ids: Tensor, parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return parts[0].new_empty((*ids.shape, shape[1]), dtype=dtype)


def _dequantize_fake(parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(tuple(shape), dtype=dtype)


def _restore_fake(
    prepared: Sequence[Tensor], order: str, part: str, first: int = 0, rows: int | None = None
) -> Tensor:
    shape, dtype = order_called(order).of_rows(first, rows).part_layout[part]
    return prepared[0].new_empty(shape, dtype=dtype)


def _same_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (_linear, _linear_fake),
    "bmm": (_bmm, _bmm_fake),
    "embedding": (_embedding, _embedding_fake),
    "dequantize": (_dequantize, _dequantize_fake),
    "restore": (_restore, _restore_fake),
    "hadamard": (_hadamard, _same_fake),
    "hadamard_back": (_hadamard_back, _same_fake),
    "fake_quantize": (_fake_quantize, _same_fake),
}
for _name, (_reference, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ptqc::{_name}", _fake, lib=_LIBRARY)


# -------------------------------------------------------------------- derivatives (weights are constants)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, spec, *_ = inputs
    ctx.save_for_backward(*parts)
    ctx.spec, ctx.in_features, ctx.lead = spec, x.shape[-1], parts[0].shape[:-1]


def _towards_x(ctx: Any, grad: Tensor) -> Tensor:
    weight = dequantize(list(ctx.saved_tensors), ctx.spec, [*ctx.lead, ctx.in_features], grad.dtype)
    towards_x: Tensor = grad @ weight
    return towards_x


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    towards_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return _towards_x(ctx, grad), [None] * len(ctx.saved_tensors), None, towards_bias


def _bmm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _towards_x(ctx, grad), [None] * len(ctx.saved_tensors), None


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name = inputs[1]


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return hadamard_back(grad, ctx.name), None


def _hadamard_back_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return hadamard(grad, ctx.name), None


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None, None


torch.library.register_autograd("ptqc::hadamard", _hadamard_backward, setup_context=_keep_name, lib=_LIBRARY)
torch.library.register_autograd("ptqc::hadamard_back", _hadamard_back_backward, setup_context=_keep_name, lib=_LIBRARY)
torch.library.register_autograd("ptqc::fake_quantize", _straight_through, lib=_LIBRARY)
torch.library.register_autograd("ptqc::linear", _linear_backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("ptqc::bmm", _bmm_backward, setup_context=_keep, lib=_LIBRARY)
