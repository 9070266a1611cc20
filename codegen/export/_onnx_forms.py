"""Stored weights in the operators that ONNX runtimes have for them.

    nbits      com.microsoft.MatMulNBits, scale * (code - zero): codes of 2, 4 or 8 bits [out, blocks, block * bits / 8]
               uint8, low bits first; scales [out, blocks]; zeros packed like codes along the blocks of a row, or floats
               [out, blocks]
               com.microsoft.MatMulBnb4, nf4 and fp4: codes [out * in / 2] uint8, high bits first, scales [out * blocks]
    standard   DequantizeLinear on INT4, UINT4, INT8, UINT8 or a float8 [in, out] in blocks along `in`, then MatMul

Codes of other widths go into the next wider one: their values stay what they are. Blocks of com.microsoft's are powers
of two; a group that is none is cut into such, with its scale repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ptqc import storage
from ptqc.packing import pack_linear
from ptqc.spec import SCALE_DTYPES, WeightSpec

__all__ = [
    "Arrays", "Blockwise", "Form", "Native", "blockwise", "float8_codes", "matmul_nbits", "native", "rounded_scale",
    "standard",
]  # fmt: skip

Form = Literal["nbits", "standard", "float"]
Arrays = list[np.ndarray[Any, Any] | None]
"""Codes, scales, and zeros or None."""

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_BNB4 = {"fp4": 0, "nf4": 1}
"""quant_type of MatMulBnb4 by codebook."""
_FLOAT8 = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}


@dataclass(frozen=True, eq=False)
class Native:
    """A weight as an operator takes it. label: of the type in the report. Operators of the domain "" give W.T, others
    the product."""

    op: str
    label: str
    arrays: Arrays
    attributes: dict[str, int]
    domain: str = ""


@dataclass(frozen=True, eq=False)
class Blockwise:
    """Scale * (codes - zero), with one scale per row and block of inputs.

    codes: [out, in] uint8, less than 2**bits. scale: [out, blocks]; zero: alike, int or float. is_integer: whether
    every zero is a code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    block: int
    is_integer: bool


def blockwise(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int]) -> Blockwise | str:
    """The weight [out, in] of these parts, or why it is no affine function of its codes."""
    book = spec.book
    is_ternary = spec.codebook == "ternary"
    if (book is not None and not is_ternary) or len(shape) != 2:
        return f"{spec.codebook} levels are no affine function of codes" if book is not None else "it is no matrix"
    if spec.rows != 1:
        return "its scales belong to blocks of rows"
    in_features = shape[-1]
    codes = spec.packer.unpack(parts["codes"], spec.bits, in_features).to(torch.uint8)
    scale, zero = storage.decode_scales(parts, spec, shape)
    if spec.zero == "none":
        zero = torch.full_like(scale, 1.0 if is_ternary else float(2 ** (spec.bits - 1)))
    elif spec.zero == "min":
        assert zero is not None
        codes, scale, zero = storage.minimum_as_zero(codes, scale, zero)
    assert zero is not None
    block = in_features // scale.shape[1]
    bits = next(width for width in (2, 4, 8) if width >= spec.bits)
    return Blockwise(codes, rounded_scale(scale, spec), zero, bits, block, spec.zero in ("none", "int"))


def rounded_scale(scale: Tensor, spec: WeightSpec) -> Tensor:
    """Scales in float16 if they are stored so, else in float32."""
    stored = scale if spec.scale.bits is not None else scale.to(SCALE_DTYPES[spec.scale.dtype])
    return stored if stored.dtype == torch.float16 else stored.float()


def native(
    form: Form, parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int], is_float32: bool = True
) -> Native | str:
    """The operator for a weight [out, in] of these parts in the form asked for, or why there is none.

    is_float32: whether the input is; runtimes multiply with codebooks in no other type on CPUs.
    """
    if form == "float":
        return "floats were asked for"
    if form == "nbits" and spec.codebook in _BNB4:
        return _bnb4(parts, spec, shape) if is_float32 else "MatMulBnb4 takes float32 only on CPUs"
    if form == "standard" and spec.book is not None and spec.book.float_dtype is not None:
        return _float8(parts, spec, shape)
    weight = blockwise(parts, spec, shape)
    if isinstance(weight, str):
        return weight
    return matmul_nbits(weight) if form == "nbits" else standard(weight)


def _divided(block: int, op: str) -> tuple[int, int] | str:
    """The block of an operator of com.microsoft for groups of `block`, and how many make a group; or why none does."""
    divided = min(block & -block, _LARGEST_BLOCK)
    if divided < _SMALLEST_BLOCK:
        return f"{op} has blocks of 16, 32, 64 ...; none of these divides the group {block}"
    return divided, block // divided


def matmul_nbits(weight: Blockwise) -> Native | str:
    """MatMulNBits, or why it cannot be."""
    out_features, in_features = weight.codes.shape
    divided = _divided(weight.block, "MatMulNBits")
    if isinstance(divided, str):
        return divided
    block, repeat = divided
    scale, zero = (values.repeat_interleave(repeat, 1) for values in (weight.scale, weight.zero))
    codes = pack_linear(weight.codes.view(out_features, -1, block), weight.bits)
    if weight.is_integer and bool((zero == 2 ** (weight.bits - 1)).all()):
        zeros = None
    else:
        zeros = pack_linear(zero.to(torch.uint8), weight.bits) if weight.is_integer else zero
    arrays = [codes.numpy(), scale.numpy(), None if zeros is None else zeros.numpy()]
    sizes = {"K": in_features, "N": out_features, "bits": weight.bits, "block_size": block}
    return Native("MatMulNBits", f"MatMulNBits {weight.bits}", arrays, sizes, "com.microsoft")


def _bnb4(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int]) -> Native | str:
    """MatMulBnb4, or why it cannot be."""
    if spec.rows != 1:
        return "its scales belong to blocks of rows"
    out_features, in_features = shape
    scale, _ = storage.decode_scales(parts, spec, shape)
    divided = _divided(in_features // scale.shape[1], "MatMulBnb4")
    if isinstance(divided, str):
        return divided
    block, repeat = divided
    codes = spec.packer.unpack(parts["codes"], spec.bits, in_features).flatten()
    packed = codes[0::2] << 4 | codes[1::2]
    scales = rounded_scale(scale, spec).repeat_interleave(repeat, 1).flatten()
    sizes = {"K": in_features, "N": out_features, "block_size": block, "quant_type": _BNB4[str(spec.codebook)]}
    return Native("MatMulBnb4", f"MatMulBnb4 {spec.codebook}", [packed.numpy(), scales.numpy(), None], sizes,
                  "com.microsoft")  # fmt: skip


def standard(weight: Blockwise) -> Native | str:
    """DequantizeLinear of integers, or why it cannot be."""
    if not weight.is_integer:
        return "DequantizeLinear has integer zero points only"
    wide = max(weight.bits, 4)
    middle = 2 ** (wide - 1)
    kinds = {4: (ml_dtypes.int4, ml_dtypes.uint4), 8: (np.int8, np.uint8)}[wide]
    codes, zero = weight.codes.mT.numpy(), weight.zero.mT.numpy()
    scale, label = weight.scale.mT.contiguous().numpy(), str(weight.bits)
    is_centred = bool((weight.zero == weight.zero.flatten()[0]).all())
    if is_centred:
        moved = codes.astype(np.int16) - int(weight.zero.flatten()[0])
        if moved.min() >= -middle and moved.max() < middle:
            return _dequantize(moved.astype(kinds[0]), scale, None, weight.block, label)
    return _dequantize(codes.astype(kinds[1]), scale, zero.astype(kinds[1]), weight.block, label)


def float8_codes(codes: Tensor) -> np.ndarray[Any, Any]:
    """Codes that are float8 themselves, for ONNX."""
    return codes.contiguous().view(torch.uint8).numpy().view(_FLOAT8[codes.dtype])


def _float8(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int]) -> Native | str:
    """DequantizeLinear of float8, or why it cannot be."""
    if len(shape) != 2 or spec.rows != 1:
        return "its scales belong to blocks of rows"
    scale, _ = storage.decode_scales(parts, spec, shape)
    scales = rounded_scale(scale, spec).mT.contiguous().numpy()
    block = shape[1] // scale.shape[1]
    return _dequantize(float8_codes(parts["codes"].mT), scales, None, block, str(spec.codebook))


def _dequantize(
    codes: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], zero: np.ndarray[Any, Any] | None, block: int, label: str
) -> Native:
    """With one block to a column the axis is that of the columns, and scales are a vector: older runtimes know that."""
    label = f"DequantizeLinear {label}"
    if scale.shape[0] > 1:
        return Native("DequantizeLinear", label, [codes, scale, zero], {"axis": 0, "block_size": block})
    arrays: Arrays = [codes, scale[0], None if zero is None else zero[0]]
    return Native("DequantizeLinear", label, arrays, {"axis": 1})
