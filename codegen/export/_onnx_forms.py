"""Stored weights in the forms that ONNX has for them.

Both compute scale * (code - zero) with codes of 2 (not "standard"), 4 or 8 bits and one scale for a block of inputs:

    nbits      com.microsoft.MatMulNBits: codes [out, blocks, block * bits / 8] uint8, low bits first; scales [out,
               blocks]; zeros packed like codes along the blocks of a row, or floats [out, blocks]
    standard   DequantizeLinear on INT4, UINT4, INT8 or UINT8 [in, out] in blocks along `in`, then MatMul

Codes of other widths go into the next wider one: their values stay what they are. Blocks of MatMulNBits are powers of
two; a group that is none is cut into such, with its scale repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ptqc import storage
from ptqc.packing import pack_linear
from ptqc.spec import SCALE_DTYPES, WeightSpec

__all__ = ["Blockwise", "blockwise", "matmul_nbits", "standard"]

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


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
    stored = scale if spec.scale.bits is not None else scale.to(SCALE_DTYPES[spec.scale.dtype])
    if stored.dtype != torch.float16:
        stored = stored.float()
    bits = next(width for width in (2, 4, 8) if width >= spec.bits)
    return Blockwise(codes, stored, zero, bits, block, spec.zero in ("none", "int"))


def matmul_nbits(weight: Blockwise) -> tuple[list[np.ndarray[Any, Any] | None], dict[str, int]] | str:
    """Inputs 1, 2 and 3 (codes, scales, zeros or None) and attributes of MatMulNBits, or why it cannot be."""
    out_features, in_features = weight.codes.shape
    block = min(weight.block & -weight.block, _LARGEST_BLOCK)
    if block < _SMALLEST_BLOCK:
        return f"MatMulNBits has blocks of 16, 32, 64 ...; none of these divides the group {weight.block}"
    repeat = weight.block // block
    scale, zero = (values.repeat_interleave(repeat, 1) for values in (weight.scale, weight.zero))
    codes = pack_linear(weight.codes.view(out_features, -1, block), weight.bits)
    if weight.is_integer and bool((zero == 2 ** (weight.bits - 1)).all()):
        zeros = None
    else:
        zeros = pack_linear(zero.to(torch.uint8), weight.bits) if weight.is_integer else zero
    arrays = [codes.numpy(), scale.numpy(), None if zeros is None else zeros.numpy()]
    return arrays, {"K": in_features, "N": out_features, "bits": weight.bits, "block_size": block}


def standard(weight: Blockwise) -> tuple[list[np.ndarray[Any, Any] | None], dict[str, int]] | str:
    """Inputs (codes, scales, zeros or None) and attributes of DequantizeLinear that gives W.T, or why it cannot be."""
    if not weight.is_integer:
        return "DequantizeLinear has integer zero points only"
    wide = max(weight.bits, 4)
    middle = 2 ** (wide - 1)
    kinds = {4: (ml_dtypes.int4, ml_dtypes.uint4), 8: (np.int8, np.uint8)}[wide]
    codes, zero = weight.codes.mT.numpy(), weight.zero.mT.numpy()
    scale = weight.scale.mT.contiguous().numpy()
    is_centred = bool((weight.zero == weight.zero.flatten()[0]).all())
    if is_centred:
        moved = codes.astype(np.int16) - int(weight.zero.flatten()[0])
        if moved.min() >= -middle and moved.max() < middle:
            return _blocked(moved.astype(kinds[0]), scale, None, weight.block)
    return _blocked(codes.astype(kinds[1]), scale, zero.astype(kinds[1]), weight.block)


def _blocked(
    codes: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], zero: np.ndarray[Any, Any] | None, block: int
) -> tuple[list[np.ndarray[Any, Any] | None], dict[str, int]]:
    """With one block to a column the axis is that of the columns, and scales are a vector: older runtimes know that."""
    if scale.shape[0] > 1:
        return [codes, scale, zero], {"axis": 0, "block_size": block}
    return [codes, scale[0], None if zero is None else zero[0]], {"axis": 1}
