"""`ptqc::` operators on their way into an ONNX graph.

What needs the stored numbers of a weight becomes one node of the domain `DOMAIN`, whose inputs are the parts of the
weight; `_onnx_fold` turns these into what a runtime knows, once the parts are initializers. Everything else is
decomposed into ATen operators by running its reference.

    Linear(x, *parts) {spec}                  -> x @ W.T, W [out, in]
    Decode(*parts) {spec, shape}              -> W
    Quantize(x, [scale]) {act}                -> x, as if quantized to int8
    Rotate(x) {name, is_back}                 -> x H.T, or x H
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ptqc import activations, ops
from ptqc.act_spec import ActSpec

__all__ = ["DOMAIN", "decompositions"]

DOMAIN = "ptqc.stored"


def _linear(x: Tensor, parts: Sequence[Tensor], spec: str, bias: Tensor | None) -> Tensor:
    shape = (*x.shape[:-1], parts[0].shape[0])
    product = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Linear", (x, *parts), {"spec": spec}, dtype=x.dtype, shape=shape, version=1
    )
    return product if bias is None else product + bias


def _decode(parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    sizes = [int(size) for size in shape]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Decode", tuple(parts), {"spec": spec, "shape": sizes}, dtype=dtype, shape=sizes, version=1
    )


def _bmm(x: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    return torch.bmm(x, _decode(parts, spec, (*parts[0].shape[:-1], x.shape[-1]), x.dtype).mT)


def _embedding(ids: Tensor, parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.embedding(ids, _decode(parts, spec, shape, dtype))


def _quantize(x: Tensor, act: str, scale: Tensor | None) -> Tensor:
    treated = ActSpec.parse(act)
    if treated.dtype != "int8" or treated.outlier is not None:
        return activations.fake_quantize(x, treated, scale)
    inputs = (x,) if scale is None else (x, scale)
    return torch.onnx.ops.symbolic(f"{DOMAIN}::Quantize", inputs, {"act": act}, dtype=x.dtype, shape=x.shape, version=1)


def _rotation(is_back: bool) -> Callable[[Tensor, str], Tensor]:
    def rotate(x: Tensor, name: str) -> Tensor:
        attributes: dict[str, Any] = {"name": name, "is_back": int(is_back)}
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Rotate", (x,), attributes, dtype=x.dtype, shape=x.shape, version=1)

    return rotate


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """What `ExportedProgram.run_decompositions` needs to know."""
    return {
        ops.linear: _linear,
        ops.bmm: _bmm,
        ops.dequantize: _decode,
        ops.embedding: _embedding,
        ops.fake_quantize: _quantize,
        ops.hadamard: _rotation(False),
        ops.hadamard_back: _rotation(True),
        torch.ops.aten.alias.default: lambda x: x,  # a view of a weight has the weight's parts, by their names
    }
