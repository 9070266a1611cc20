"""GGUF tensor types: how a run of weights becomes a block of bytes.

A row of a tensor is cut into blocks of `weights` numbers, each stored in `nbytes` bytes, little-endian:

    Q8_0   [scale f16][32 x int8]                             w = scale * code
    Q4_0   [scale f16][16 bytes: low nibble j, high j + 16]   w = scale * (nibble - 8)

A new type is a row of TYPES. Types with a `grid` store integers times a float16 scale, so a weight quantized to such
integers can be carried over without touching a value.

NumPy, not torch: these are long chains of small operations, run by a thread pool on pieces that fit the cache, and
torch's own threads make them 4 to 30 times slower on a busy machine (two cores, November 2026).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["TYPES", "BlockType", "Grid"]

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Levels = NDArray[np.int8]
Bytes = NDArray[np.uint8]

_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """Integers low..high, and pack(levels [n, weights], scale [n, 1]) -> [n, nbytes]."""

    low: int
    high: int
    pack: Callable[[Levels, Halves], Bytes]


@dataclass(frozen=True)
class BlockType:
    """A tensor type.

    encode: [n, weights] finite float32 -> [n, nbytes] uint8. largest: the greatest magnitude it takes, with room for
    every scale that a search may try. exact_for: float types whose every value it stores exactly.
    """

    name: str
    weights: int
    nbytes: int
    largest: float
    encode: Callable[[Floats], Bytes]
    grid: Grid | None = None
    exact_for: frozenset[torch.dtype] = frozenset()


def encode_f32(blocks: Floats) -> Bytes:
    """The numbers themselves."""
    return blocks.view(np.uint8)


def encode_f16(blocks: Floats) -> Bytes:
    """Round to nearest even."""
    return blocks.astype(np.float16).view(np.uint8)


def encode_bf16(blocks: Floats) -> Bytes:
    """Round to nearest even."""
    rounded: Bytes = torch.from_numpy(blocks).bfloat16().view(torch.uint8).numpy()
    return rounded


def pack_q8_0(levels: Levels, scale: Halves) -> Bytes:
    """Scale, then one byte per level."""
    return np.concatenate([scale.view(np.uint8), levels.view(np.uint8)], axis=1)


def pack_q4_0(levels: Levels, scale: Halves) -> Bytes:
    """Scale, then levels -8..7 as nibbles: weight j low, weight j + 16 high."""
    codes = (levels + np.int8(8)).view(np.uint8)
    return np.concatenate([scale.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def encode_q8_0(blocks: Floats) -> Bytes:
    """The largest magnitude becomes 127, every weight the code nearest to it under the scale as stored.

    Where float16 would round the scale so far down that the largest is off by more than half a step (subnormal
    scales), the next greater one is taken: no weight is ever off by more than half a step.
    """
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    scale = (peak / np.float32(127)).astype(np.float16)
    is_short = scale.astype(np.float32) * np.float32(127.5) < peak
    scale = (scale.view(np.int16) + is_short).astype(np.int16).view(np.float16)
    return pack_q8_0(_nearest(blocks, scale, -127, 127), scale)


def encode_q4_0(blocks: Floats) -> Bytes:
    """The scale of least squared error among a search that starts from the largest magnitude at level -8.

    Each candidate puts the largest magnitude at another level, rounds, and takes the scale that fits those codes best,
    sum(w * code) / sum(code^2). The result is never worse than the start.
    """
    weights = np.ascontiguousarray(blocks.T)  # [32, n]: reductions over the first axis run at full width
    peak = np.take_along_axis(weights, np.abs(weights).argmax(axis=0)[None], axis=0)
    best = _Scale(weights, (peak / np.float32(-8)).astype(np.float16))
    gain, fitted = np.full_like(peak, -1), np.zeros_like(peak)
    for level in _Q4_0_PEAKS:
        codes = (weights * _inverse(peak / np.float32(level))).round().clip(-8, 7)
        projection = (weights * codes).sum(axis=0, keepdims=True)
        optimum = projection / np.maximum(np.square(codes).sum(axis=0, keepdims=True), 1)
        is_better = projection * optimum > gain  # the squared error is sum(w^2) minus this
        gain = np.where(is_better, projection * optimum, gain)
        fitted = np.where(is_better, optimum, fitted)
    scale = best.or_better(_Scale(weights, fitted.astype(np.float16)))
    return pack_q4_0(_nearest(blocks, scale.T, -8, 7), scale.T)


_Q4_0_PEAKS = (-9.0, -8.7, -8.4, -8.2, -8.0, -7.8, -7.6, -7.3, -7.0)


class _Scale:
    """A stored scale [1, n] for weights [32, n] in Q4_0, and the squared error [1, n] it leaves."""

    def __init__(self, weights: Floats, scale: Halves) -> None:
        self.scale = scale
        left = _nearest(weights, scale, -8, 7) * scale.astype(np.float32) - weights
        self.error = np.square(left).sum(axis=0, keepdims=True)

    def or_better(self, other: "_Scale") -> Halves:
        return np.where(other.error < self.error, other.scale, self.scale)


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 for scales so small that float16 stores them as 0."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > np.float32(2**-26))


def _nearest(weights: Floats, scale: Halves, low: int, high: int) -> Levels:
    return (weights * _inverse(scale.astype(np.float32))).round().clip(low, high).astype(np.int8)


TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType(
            "F32", 1, 4, float(np.finfo(np.float32).max), encode_f32,
            exact_for=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        ),
        BlockType("F16", 1, 2, _HALF_MAX, encode_f16, exact_for=frozenset({torch.float16})),
        BlockType("BF16", 1, 2, torch.finfo(torch.bfloat16).max, encode_bf16, exact_for=frozenset({torch.bfloat16})),
        BlockType("Q8_0", 32, 34, 127 * _HALF_MAX, encode_q8_0, Grid(-128, 127, pack_q8_0)),
        BlockType("Q4_0", 32, 18, 4 * _HALF_MAX, encode_q4_0, Grid(-8, 7, pack_q4_0)),
    )
}  # fmt: skip
"""Tensor types by their GGUF names."""
