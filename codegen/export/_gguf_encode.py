"""From a weight to the bytes of a GGUF tensor: carried over where the type holds its codes, else searched.

A tensor is read and written in bands of rows, so that no more than one of them is in memory. A band is cut into tiles,
and a pool of threads works on them: a few large ones where an encoder is compiled for the type (`_gguf_native`); else
of some hundred rows and whole blocks, which stay in the cache of a core while NumPy passes over them again and again.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ptqc.codegen.export._gguf_blocks import TYPES, BlockType
from ptqc.codegen.export._gguf_carry import carried
from ptqc.codegen.export._gguf_native import native_encoder
from ptqc.codegen.export._gguf_placement import Placement
from ptqc.codegen.exporters import Fate
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor

__all__ = ["encode_bands", "encode_weight", "exact_type", "fate_of"]

_WEIGHTS_IN_BAND = 1 << 23
_WEIGHTS_AT_ONCE, _ROWS_AT_ONCE, _NATIVE_AT_ONCE = 1 << 17, 256, 1 << 21
"""Weights and rows of a tile for NumPy, weights of one for a compiled encoder."""
_WORTH_COMPILING, _WORTH_WAITING = 1 << 18, 1 << 25
"""Weights: smaller ones never ask for a compiled encoder, or do not wait until it is compiled."""
_SMALLEST_IMPORTANCE = np.float32(1e-6)
"""Of a column, relative to the mean: a column that calibration never used still gets the nearest codes."""


def fate_of(weight: Tensor, kind: BlockType) -> Fate:
    """What becomes of a weight [out, in] or [n] stored as `kind`."""
    held = carried(weight, kind)
    if weight.dtype in kind.exact_for or (held is not None and held.is_exact):
        return "lossless"
    return "requantized" if isinstance(weight, QuantTensor) else "converted"


def exact_type(weight: Tensor, columns: int) -> str:
    """The smallest type that holds a weight with rows of so many columns as it is; for a stored weight whose grid no
    type has, a float type."""
    divided = [kind for kind in TYPES.values() if columns % kind.weights == 0]
    fitting = [kind for kind in divided if fate_of(weight, kind) == "lossless"]
    return min(fitting, key=lambda kind: kind.nbytes / kind.weights).name


def encode_bands(
    at: Placement, kind: BlockType, importance: NDArray[np.float32] | None = None
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor, one band of rows after the other. importance: [in], or [lead * in] for a stack, in which
    every matrix has its own.

    Raises: ExportError as `encode_weight` does, and for an importance of another size.
    """
    rows, columns = at.matrix_shape
    own = [None] if importance is None else _by_matrix(importance, rows, at)
    for number, counts in enumerate(own):
        first, last = number * rows // len(own), (number + 1) * rows // len(own)
        step = last - first if at.is_read_whole else max(_ROWS_AT_ONCE, _WEIGHTS_IN_BAND // columns)
        for start in range(first, last, step):
            yield encode_weight(at.band(start, min(start + step, last)), kind, at.name, counts, rows * columns)


def _by_matrix(importance: NDArray[np.float32], rows: int, at: Placement) -> list[NDArray[np.float32] | None]:
    """One for the whole tensor, or one for each matrix of a stack."""
    stack = math.prod(at.shape[:-2])
    if importance.size == stack * at.shape[-1]:
        return list(importance.reshape(stack, -1))
    return [importance]


def encode_weight(
    weight: Tensor, kind: BlockType, name: str, importance: NDArray[np.float32] | None = None, total: int = 0
) -> NDArray[np.uint8]:
    """The bytes of a weight: [out, in / kind.weights * kind.nbytes] uint8, or one axis less for a vector.

    weight: [out, in] or [in], float or QuantTensor; `in` is divided by the block. name: for messages. importance: [in],
    what an error in each column counts. total: weights of the tensor that this is a band of.

    Raises: ExportError for NaN or infinite values, and magnitudes the type cannot hold.
    """
    matrix = weight.detach() if weight.ndim == 2 else weight.detach().unsqueeze(0)
    rows, columns = matrix.shape
    encoded = np.empty((rows, columns // kind.weights * kind.nbytes), np.uint8)
    held = carried(matrix, kind)
    counts = None if importance is None else _relative(importance, columns, name)
    is_large = held is None and matrix.numel() >= _WORTH_COMPILING
    native = native_encoder(kind.name, counts is not None) if is_large else None
    if native is not None and max(total, matrix.numel()) >= _WORTH_WAITING:
        native.wait()

    def encode_tile(at: tuple[slice, slice]) -> None:
        down, across = at
        start, stop = (edge // kind.weights * kind.nbytes for edge in (across.start, across.stop))
        if held is not None:
            tile = held.blocks(down)
        else:
            tile = kind.encode(_floats(matrix[down, across], kind, name), None if counts is None else counts[across])
        encoded[down, start:stop] = tile.reshape(down.stop - down.start, -1)

    def encode_rows(down: slice) -> None:
        numbers = _plain(matrix[down])
        if native is None or not native.encode(numbers, counts, encoded[down]):
            _check(numbers, kind, name)
            encoded[down] = kind.encode(numbers, counts)

    if native is not None and native.is_ready:
        down = min(max(1, _NATIVE_AT_ONCE // columns), -(-rows // (2 * _threads())))
        work = _pool().map(encode_rows, [slice(top, min(top + down, rows)) for top in range(0, rows, down)])
    else:
        # A stored weight is carried, or decoded, in whole rows.
        widest = columns if isinstance(matrix, QuantTensor) else _WEIGHTS_AT_ONCE // _ROWS_AT_ONCE
        work = _pool().map(encode_tile, _tiles(rows, columns, widest, kind.weights))
    for _ in work:  # consuming re-raises
        pass
    return encoded if weight.ndim == 2 else encoded[0]


def _threads() -> int:
    return os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="ptqc-encode")


def _tiles(rows: int, columns: int, widest: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every tile; columns are cut between blocks."""
    across = max(block, min(columns, widest) // block * block)
    down = max(1, _WEIGHTS_AT_ONCE // across)
    for top in range(0, rows, down):
        for left in range(0, columns, across):
            yield slice(top, min(top + down, rows)), slice(left, min(left + across, columns))


def _relative(importance: NDArray[np.float32], columns: int, name: str) -> NDArray[np.float32]:
    """Importance with a mean of 1, nowhere 0; all columns alike if it says nothing."""
    counts = np.asarray(importance, np.float32)
    if counts.shape != (columns,) or not np.isfinite(counts).all() or (counts < 0).any():
        raise ExportError(
            f'the importance of "{name}" must be {columns} finite numbers that are not negative, one per column of the '
            f"weight; found an array of shape {counts.shape}"
        )
    mean = counts.mean(dtype=np.float64)
    if not mean > 0:
        return np.ones_like(counts)
    relative: NDArray[np.float32] = np.maximum((counts / mean).astype(np.float32), _SMALLEST_IMPORTANCE)
    return relative


def _plain(rows: Tensor) -> NDArray[np.float32]:
    """Rows as floats."""
    plain = rows.dequantize() if isinstance(rows, QuantTensor) else rows
    numbers: NDArray[np.float32] = np.ascontiguousarray(plain.float().cpu().numpy())
    return numbers


def _floats(rows: Tensor, kind: BlockType, name: str) -> NDArray[np.float32]:
    """Rows as floats that the type can hold."""
    numbers = _plain(rows)
    _check(numbers, kind, name)
    return numbers


def _check(numbers: NDArray[np.float32], kind: BlockType, name: str) -> None:
    peak = float(np.abs(numbers).max(initial=0))
    if not peak <= kind.largest:  # NaN compares false
        fault = f"values up to {peak:.3g}, above the {kind.largest:.3g} of {kind.name}; use BF16 or F32"
        raise ExportError(f'"{name}" holds {fault if np.isfinite(peak) else "NaN or infinite values"}')
