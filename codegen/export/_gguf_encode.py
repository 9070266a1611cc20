"""From a weight to the bytes of a GGUF tensor: carried over where the type has the weight's own grid, else encoded.

A QuantTensor is carried over (codes and scales, not a value touched) when

1. its levels less their integer zero are integers within the type's grid,
2. its groups run along the row and hold whole blocks (groups of 128 become four blocks of one scale),
3. its scales are float16 numbers, however they are stored.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptqc import storage
from ptqc.codegen.export._gguf_blocks import TYPES, BlockType, Grid
from ptqc.codegen.exporters import Fate
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec

__all__ = ["encode_weight", "exact_type", "fate_of"]

_WEIGHTS_AT_ONCE = 1 << 18
"""A piece of rows and what encoders make of it stay within the cache of a core."""


def fate_of(weight: Tensor, kind: BlockType) -> Fate:
    """What becomes of a weight [out, in] or [n] stored as `kind`."""
    if weight.dtype in kind.exact_for or _carried(weight, kind) is not None:
        return "lossless"
    return "requantized" if isinstance(weight, QuantTensor) else "converted"


def exact_type(weight: Tensor) -> str:
    """The smallest type that holds a weight as it is; for a stored weight whose grid no type has, a float type."""
    fitting = [kind for kind in TYPES.values() if fate_of(weight, kind) == "lossless"]
    return min(fitting, key=lambda kind: kind.nbytes / kind.weights).name


def encode_weight(weight: Tensor, kind: BlockType, name: str) -> NDArray[np.uint8]:
    """The bytes of a weight: [out, in / kind.weights * kind.nbytes] uint8, or one axis less for a vector.

    weight: [out, in] or [in], float or QuantTensor; `in` is divided by the block. name: for messages.

    Raises: ExportError for NaN or infinite values, and magnitudes the type cannot hold.
    """
    matrix = weight.detach() if weight.ndim == 2 else weight.detach().unsqueeze(0)
    rows, columns = matrix.shape
    encoded = np.empty((rows, columns // kind.weights * kind.nbytes), np.uint8)
    carried = _carried(matrix, kind)

    def encode_rows(at: slice) -> None:
        if carried is not None:
            blocks = carried.blocks(at)
        else:
            blocks = kind.encode(_floats(matrix[at], kind, name).reshape(-1, kind.weights))
        encoded[at] = blocks.reshape(encoded[at].shape)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(encode_rows, _pieces(rows, columns)):  # consuming re-raises
            pass
    return encoded if weight.ndim == 2 else encoded[0]


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _floats(rows: Tensor, kind: BlockType, name: str) -> NDArray[np.float32]:
    plain = rows.dequantize() if isinstance(rows, QuantTensor) else rows
    numbers: NDArray[np.float32] = np.ascontiguousarray(plain.float().cpu().numpy())
    peak = float(np.abs(numbers).max(initial=0))
    if not peak <= kind.largest:  # NaN compares false
        fault = f"values up to {peak:.3g}, above the {kind.largest:.3g} of {kind.name}; use BF16 or F32"
        raise ExportError(f'"{name}" holds {fault if np.isfinite(peak) else "NaN or infinite values"}')
    return numbers


# -------------------------------------------------------------------- carrying codes over


@dataclass(frozen=True)
class _Carried:
    """A stored weight [out, in] that `grid` holds. scale: [out, blocks]. zero: [out, groups] integers, or None."""

    weight: QuantTensor
    grid: Grid
    scale: NDArray[np.float16]
    zero: Tensor | None

    def blocks(self, at: slice) -> NDArray[np.uint8]:
        """Packed blocks [n, nbytes] of the rows `at`."""
        spec, columns = self.weight.spec, self.weight.shape[1]
        levels = storage.levels(spec.packer.unpack(self.weight.codes[at], spec.bits, columns), spec)
        if self.zero is not None:
            levels = levels - self.zero[at].repeat_interleave(columns // self.zero.shape[1], dim=1)
        scale = self.scale[at].reshape(-1, 1)
        return self.grid.pack(levels.to(torch.int8).cpu().numpy().reshape(len(scale), -1), scale)


def _carried(weight: Tensor, kind: BlockType) -> _Carried | None:
    if not isinstance(weight, QuantTensor) or kind.grid is None or weight.is_transposed or weight.ndim != 2:
        return None
    if not weight.surroundings.keeps_weight:
        return None
    group = weight.spec.group or weight.shape[1]
    if weight.spec.rows != 1 or group % kind.weights or not _is_within(weight.spec, kind.grid):
        return None
    scale, zero = storage.decode_scales(weight.parts, weight.spec, weight.stored_shape)
    half = scale.half()
    if not torch.equal(half.float(), scale):
        return None
    return _Carried(weight, kind.grid, half.repeat_interleave(group // kind.weights, dim=1).cpu().numpy(), zero)


def _is_within(spec: WeightSpec, grid: Grid) -> bool:
    """Whether every level of `spec`, less any zero, is an integer of the grid."""
    if spec.vector != 1 or spec.zero not in ("none", "int"):
        return False
    if spec.book is None:
        steps = 2**spec.bits - 1
        low = -steps if spec.zero == "int" else -(2 ** (spec.bits - 1))
        return grid.low <= low and low + steps <= grid.high and (spec.zero == "none" or steps <= grid.high)
    if spec.book.float_dtype is not None or spec.zero == "int":
        return False
    table = spec.book.table()
    return bool((table == table.round()).all() and grid.low <= table.min() and table.max() <= grid.high)
