"""The C++ text of an encoder: the search of `_gguf_search`, with the rows of `_gguf_layouts`, for one type.

A lane of a vector is a block (superblock): L of them are searched at once, every number as [weight][lane]. Each
operation, and the order of each sum, is that of the NumPy search, so the bytes are the same on every machine; hence
products and sums are never contracted (-ffp-contract=off), and sums begin with their first term.
"""

from collections.abc import Sequence

import numpy as np

from ptqc.codegen.cpp.isa import Isa, vectors
from ptqc.codegen.export._gguf_blocks import BlockType
from ptqc.codegen.export._gguf_cpp_blocks import BASICS, PACKING, RUN, SHUFFLE
from ptqc.codegen.export._gguf_cpp_search import FIT, QUICK, SEARCH, STEPS
from ptqc.codegen.export._gguf_layouts import RUNS_OF_DIGITS, Layout, Plane
from ptqc.codegen.export._gguf_levels import Levels
from ptqc.codegen.export._gguf_quick import LARGEST_BIAS, LARGEST_FACTOR, UNITS, QuickSearch
from ptqc.codegen.export._gguf_search import PEAKS_OF_SCALES, Search

__all__ = ["FLAGS", "encoder_source"]

FLAGS = ("-ffp-contract=off",)


def encoder_source(kind: BlockType, is_weighted: bool, isa: Isa) -> str:
    """The text for a type that stores codes. is_weighted: whether columns count differently."""
    assert kind.layout is not None
    search, quick = kind.search, None if is_weighted else kind.quick
    header = {
        "WEIGHTS": kind.weights, "NBYTES": kind.nbytes, "IS_WEIGHTED": is_weighted and search is not None,
        "LARGEST": kind.largest,
    }  # fmt: skip
    tables: dict[str, Sequence[float]] = {}
    body = STEPS
    if quick is not None:
        header |= _constants(quick.search, kind.weights) | _constants_of_quick(quick)
        tables = _tables_of_quick(quick)
        body = FIT + QUICK
    elif search is not None:
        header |= _constants(search, kind.weights)
        tables = _tables(search)
        body = FIT + SEARCH
    lines = [
        *(f"constexpr {_kind(value)} {name} = {_literal(value)};\n" for name, value in header.items()),
        *(f"constexpr {_kind(row[0])} {name}[] = {{{_literals(row)}}};\n" for name, row in tables.items()),
    ]
    return "".join((
        "#include <utility>\n", vectors(isa.lanes), isa.functions, SHUFFLE, *lines, BASICS, PACKING,
        _pack(kind.layout), body, RUN,
    ))  # fmt: skip


def _kind(value: float) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"


def _literal(value: float) -> str:
    if isinstance(value, (bool, int)):
        return str(value).lower()
    return f"{float(np.float32(value)).hex()}f"


def _literals(row: Sequence[float]) -> str:
    return ", ".join(map(_literal, row))


def _constants(search: Search, weights: int) -> dict[str, float]:
    spec, levels = search.spec, Levels.of(search.spec)
    group, bits = spec.group or weights, spec.scale.bits
    low, high = search.range_of_scales
    return {
        "GROUP": group, "GROUPS": weights // group, "TURNS": search.turns,
        "CANDIDATES": len(search.ends or search.peaks), "HAS_ENDS": bool(search.ends),
        "HAS_MINIMUM": spec.zero == "min", "IS_NESTED": bits is not None, "IS_TABLE": bool(levels.table),
        "IS_TERNARY": (levels.low, levels.high) == (-1, 1),
        "LOW": float(levels.low), "HIGH": float(levels.high), "SCALE_LOW": float(low), "SCALE_HIGH": float(high),
        "FLOOR_HIGH": float(high - low), "SCALE_PEAKS": len(PEAKS_OF_SCALES.get(high, (0,))),
        "FLOOR_PEAKS": len(PEAKS_OF_SCALES.get(high - low, (0,))),
    }  # fmt: skip


def _tables(search: Search) -> dict[str, Sequence[float]]:
    levels, (low, high) = Levels.of(search.spec), search.range_of_scales
    codes, near = levels.places if levels.table else (np.zeros(1, np.uint8), np.zeros(1, np.float32))
    return {
        "STRETCHES": [float(stretch) for stretch, _ in search.candidates],
        "SHIFTS": [float(shift) for _, shift in search.candidates],
        "PEAKS": [float(peak * (low or high)) for peak in PEAKS_OF_SCALES.get(high, (0,))],
        "FLOORS": [float(peak * (high - low)) for peak in PEAKS_OF_SCALES.get(high - low, (0,))],
        "LEVELS": [float(level) for level in near], "CODES": [float(code) for code in codes],
    }  # fmt: skip


def _constants_of_quick(quick: QuickSearch) -> dict[str, float]:
    return {
        "FRACTION": quick.fraction, "UNITS": float(UNITS), "LARGEST_FACTOR": float(LARGEST_FACTOR),
        "LARGEST_BIAS": float(LARGEST_BIAS),
    }  # fmt: skip


def _tables_of_quick(quick: QuickSearch) -> dict[str, Sequence[float]]:
    return {
        "FACTORS": [factor for factor, _ in quick.candidates], "BIASES": [bias for _, bias in quick.candidates],
    }  # fmt: skip


def _pack(layout: Layout) -> str:
    """The function that puts codes, scales and floats of a block where the layout has them."""
    lines = [f"    put_half(outer[{number}], {offset}, out);\n" for number, offset in enumerate(layout.floats)]
    lines += [_put(plane, layout) for plane in layout.planes]
    if layout.digits is not None:
        start = 0
        for first, run, count in RUNS_OF_DIGITS:
            lines.append(f"    put_digits<{start}, {first}, {run}, {count}>(codes, out);\n")
            start += run
    head = "static inline void pack(const vi *codes, const vi *scales, const vf *outer, vu *out) {\n"
    return f"{head}{''.join(lines)}}}\n"


def _put(plane: Plane, layout: Layout) -> str:
    first, last = plane.entries or (0, layout.weights if plane.field == "codes" else layout.scales)
    numbers = (plane.offset, plane.run, plane.width, plane.start, plane.shift, plane.flip, first, last)
    return f"    put<{', '.join(map(str, numbers))}>({plane.field}, out);\n"
