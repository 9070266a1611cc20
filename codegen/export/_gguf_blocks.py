"""GGUF tensor types: how rows of weights become blocks of bytes, and back.

A row of a tensor is cut into blocks of `weights` numbers, each stored in `nbytes` bytes, little-endian. Types that
store codes are rows of `_SEARCHES`: a spec (which says what the codes mean) and how to search scales; where the bits go
is the table of `_gguf_layouts`. Q8_0 needs no search: its steps are finer than anything a scale could win.

This is what the types mean; large weights are encoded by the same in C++ (`_gguf_native`). NumPy, not torch: these are
long chains of small operations, run by a thread pool on pieces that fit the cache, and torch's own threads make them
4 to 30 times slower on a busy machine (two cores, November 2026).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ptqc.codegen.export._gguf_layouts import LAYOUTS, Fields, Layout
from ptqc.codegen.export._gguf_quick import QuickSearch
from ptqc.codegen.export._gguf_search import Search, largest_magnitude
from ptqc.spec import KNOWN_SPECS, WeightSpec

__all__ = ["TYPES", "BlockType"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_HALF_MAX = 65504.0


@dataclass(frozen=True)
class BlockType:
    """A tensor type.

    encode: finite float32 [rows, columns], and the importance [columns] of the columns or None -> bytes
    [rows, columns / weights * nbytes]. largest: the greatest magnitude it takes, with room for every scale that a
    search may try. spec, layout: of its codes, None for floats. search: for its scales, if there is one; quick: what is
    done instead without importance. exact_for: float types whose every value it stores.
    """

    name: str
    weights: int
    nbytes: int
    largest: float
    encode: Callable[[Floats, Floats | None], Bytes]
    spec: WeightSpec | None = None
    layout: Layout | None = None
    search: Search | None = None
    quick: QuickSearch | None = None
    exact_for: frozenset[torch.dtype] = frozenset()

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight in the file."""
        return self.nbytes * 8 / self.weights


def encode_f32(rows: Floats, importance: Floats | None = None) -> Bytes:
    """The numbers themselves."""
    return np.ascontiguousarray(rows).view(np.uint8)


def encode_f16(rows: Floats, importance: Floats | None = None) -> Bytes:
    """Round to nearest even."""
    return rows.astype(np.float16).view(np.uint8)


def encode_bf16(rows: Floats, importance: Floats | None = None) -> Bytes:
    """Round to nearest even."""
    rounded: Bytes = torch.from_numpy(np.ascontiguousarray(rows)).bfloat16().view(torch.uint8).numpy()
    return rounded


def encode_q8_0(rows: Floats, importance: Floats | None = None) -> Bytes:
    """The largest magnitude becomes 127, every weight the code nearest to it under the scale as stored.

    Where float16 would round the scale so far down that the largest is off by more than half a step (subnormal
    scales), the next greater one is taken: no weight is ever off by more than half a step.
    """
    blocks = np.ascontiguousarray(rows).reshape(-1, 32)
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    scale = (peak / np.float32(127)).astype(np.float16)
    is_short = scale.astype(np.float32) * np.float32(127.5) < peak
    scale = (scale.view(np.int16) + is_short).astype(np.int16).view(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)
    codes = (blocks * inverse).round().clip(-127, 127) + np.float32(128)
    packed = LAYOUTS["Q8_0"].pack(Fields(codes.astype(np.uint8), scale, np.empty((len(scale), 0), np.uint8)))
    return packed.reshape(len(rows), -1)


def _around(peak: float, reach: float, steps: int) -> tuple[float, ...]:
    """Levels near `peak` (evenly, both ways), itself first."""
    return peak, *(peak + reach * (2 * step / (steps - 1) - 1) for step in range(steps) if 2 * step != steps - 1)


_FINE = ((0.0, 0.0), *((below / 5 + 0.1, above / 5 + 0.1) for below in range(-3, 3) for above in range(-3, 3)))
_WIDE = (*((below / 4, above / 4) for below in range(-1, 4) for above in range(-1, 4)), (1.2, 1.2))
_FEW = ((0.0, 0.3), (0.3, 0.0))
_TERNARY = tuple(1 + step / 4 for step in range(12))
_STEPS = (-0.5, -0.1, 0.3, 0.7)
_SOME = tuple((a, b) for a in _STEPS for b in _STEPS if -0.9 < a + b < 1.1 and abs(a - b) < 1.1)

_SEARCHES: dict[str, Search] = {
    "Q4_0": Search(KNOWN_SPECS["q4_0"], peaks=(*_around(-8, 1.0, 9), 7.0)),
    "Q4_1": Search(KNOWN_SPECS["q4_1"], ends=_SOME),
    "Q5_0": Search(KNOWN_SPECS["q5_0"], peaks=(*_around(-16, 1.2, 9), 15.0)),
    "Q5_1": Search(KNOWN_SPECS["q5_1"], ends=_FINE),
    "Q2_K": Search(KNOWN_SPECS["q2_K"], ends=_WIDE, turns=4),
    "Q3_K": Search(KNOWN_SPECS["q3_K"], peaks=(*_around(-4, 0.8, 8), 3.0, 3.4)),
    "Q4_K": Search(KNOWN_SPECS["q4_K"], ends=_SOME),
    "Q5_K": Search(KNOWN_SPECS["q5_K"], ends=_SOME),
    "Q6_K": Search(KNOWN_SPECS["q6_K"], peaks=(*_around(-32, 1.2, 6), 31.0)),
    "IQ4_NL": Search(KNOWN_SPECS["iq4_nl"], peaks=(*_around(-127, 25.0, 8), 113.0, 122.0)),
    "IQ4_XS": Search(KNOWN_SPECS["iq4_xs"], peaks=(*_around(-127, 25.0, 8), 113.0, 122.0)),
    "TQ1_0": Search(WeightSpec.parse("ternaryg256"), peaks=_TERNARY, turns=2),
    "TQ2_0": Search(KNOWN_SPECS["tq2_0"], peaks=_TERNARY, turns=2),
}


_QUICK: dict[str, QuickSearch] = {
    "Q4_0": QuickSearch(Search(KNOWN_SPECS["q4_0"], peaks=(*_around(-8, 0.8, 4), 7.0))),
    "Q4_1": QuickSearch(Search(KNOWN_SPECS["q4_1"], ends=_FEW)),
    "Q5_0": QuickSearch(_SEARCHES["Q5_0"]),
    "Q5_1": QuickSearch(Search(KNOWN_SPECS["q5_1"], ends=tuple(ends for ends in _SOME if sum(ends) < 0.9))),
}


def _searched(name: str, search: Search, quick: QuickSearch | None) -> BlockType:
    layout = LAYOUTS[name]

    def encode(rows: Floats, importance: Floats | None = None) -> Bytes:
        fields = quick.run(rows) if quick is not None and importance is None else search.run(rows, importance)
        return layout.pack(fields).reshape(len(rows), -1)

    largest = largest_magnitude(search.spec)
    return BlockType(name, layout.weights, layout.nbytes, largest, encode, search.spec, layout, search, quick)


TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType(
            "F32", 1, 4, float(np.finfo(np.float32).max), encode_f32,
            exact_for=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        ),
        BlockType("F16", 1, 2, _HALF_MAX, encode_f16, exact_for=frozenset({torch.float16})),
        BlockType("BF16", 1, 2, torch.finfo(torch.bfloat16).max, encode_bf16, exact_for=frozenset({torch.bfloat16})),
        BlockType("Q8_0", 32, 34, 127 * _HALF_MAX, encode_q8_0, KNOWN_SPECS["q8_0"], LAYOUTS["Q8_0"]),
        *(_searched(name, search, _QUICK.get(name)) for name, search in _SEARCHES.items()),
    )
}  # fmt: skip
"""Tensor types by their GGUF names."""
