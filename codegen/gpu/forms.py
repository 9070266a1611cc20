"""Which form a spec takes in kernels on 16-bit words: its layout, the text that decodes it, its scales and zeros.

`form_of` is what the text is made from; `ptqc.codegen.gpu.parts` brings stored parts into that form.
"""

from dataclasses import dataclass
from math import gcd

import torch

from ptqc.codegen.gpu.decode import Subtracted, decode_integers
from ptqc.codegen.gpu.lattices import decode_lattice, lattice_layout, lattice_tables
from ptqc.codegen.gpu.levels import decode_floats, decode_table, whole_levels
from ptqc.codegen.gpu.ptx import HALVES, Half
from ptqc.codegen.gpu.scaled import decode_scaled, decode_scaled_table, is_scaled, scale_steps
from ptqc.codegen.gpu.words import WordLayout, word_layout
from ptqc.spec import WeightSpec

__all__ = ["WeightForm", "fields_per_scale", "form_of"]

_FEW_ROWS = 32
"""Rows of a block that has many fields, or many groups: two warps then do with fewer instructions than four."""

_MOST_FIELDS = 4
"""More fields than this do not fit in registers beside sums for many rows."""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """layout of the words; fields_per_scale: fields of a block that share a scale, None for scales of whole rows.

    stride: distance of neighbouring rows in the input (8 for codes of eight weights). functions and calls: the text
    that decodes words w0 .. into levels f0 .. . pointers: of the prepared parts, in order.
    """

    spec: WeightSpec
    half: Half | None
    layout: WordLayout
    fields_per_scale: int | None
    subtracted: Subtracted
    functions: str
    calls: tuple[str, ...]
    stride: int = 1
    factor: float = 1.0
    tables: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    """Lines before the loop."""
    words_type: str = "*i16"
    is_scaled: bool = False
    """True if the levels come out of `calls` multiplied by their scales (`ptqc.codegen.gpu.scaled`)."""
    scale_steps: tuple[float, ...] = (1.0,)
    """What the scales of a row of scale words are stored multiplied by: powers of two."""

    @property
    def pointers(self) -> dict[str, str]:
        """Names of the prepared parts in kernels, in order, and their types as Triton's compiler wants them."""
        found = {"w_ptr": self.words_type}
        if self.fields_per_scale is not None:
            found |= {"s_ptr": "*i32", "norm_ptr": "*fp32"}
        else:
            found |= {"s_ptr": "*fp32"} | ({"z_ptr": "*fp32"} if self.subtracted.is_tile else {})
        return found | {name: "*fp32" if name == "levels_ptr" else "*i32" for name in self.tables}

    @property
    def decoding(self) -> str:
        """Which tiles suit it: a row of `tiles.TILES`."""
        if self.words_type != "*i16":
            return "eight bits and zeros" if self.subtracted.is_tile else "eight bits"
        if self.half is None:
            return "float32"
        # More than 4 bits in words of 256 inputs: a stage less, or only one program fits.
        has_planes = self.layout.block >= 256 and self.layout.words * 16 > 4 * self.layout.fields
        is_short = self.fields_per_scale == 1 and self.layout.rows <= _FEW_ROWS
        if self.is_scaled and self.layout.rows <= _FEW_ROWS:
            return "planes" if has_planes else "short groups" if is_short else "many fields"
        if has_planes:
            return "sums of planes"
        if "planes_ptr" in self.tables:
            return "table"
        has_sums = self.fields_per_scale is not None and not self.is_scaled
        if is_short and has_sums and not self.subtracted.is_tile and self.layout.fields <= 2 * _MOST_FIELDS:
            return "sums of short groups"
        return "sums of groups" if has_sums or self.layout.fields > _MOST_FIELDS else "arithmetic"

    @property
    def scales_per_row(self) -> int:
        """Scales that lie in one row of scale words: those of a block, or one for several blocks."""
        return 1 if self.is_group_long else self.layout.fields // (self.fields_per_scale or self.layout.fields)

    @property
    def is_group_long(self) -> bool:
        """True if a group is a number of whole blocks."""
        return self.spec.group is not None and self.spec.group % self.layout.block == 0

    @property
    def inputs_per_row(self) -> int:
        """Inputs that share a row of scale words."""
        return self.spec.group if self.is_group_long and self.spec.group else self.layout.block


def form_of(spec: WeightSpec, k: int, dtype: torch.dtype) -> WeightForm | str:
    """The form of a spec for activations of `dtype`, or the reason why it has none."""
    half = HALVES.get(dtype)
    group = None if spec.group is None or spec.group >= k else spec.group
    book = spec.book
    lattice = None if book is None else book.lattice
    layout = word_layout(spec.bits, group) if lattice is None else lattice_layout(lattice, group)
    if isinstance(layout, str):
        return layout
    shared = None if group is None else layout.fields if lattice else fields_per_scale(layout, group)
    subtracted = _subtracted(spec)
    if lattice is not None:
        functions, calls = decode_lattice(lattice, half)
        return WeightForm(
            spec, half, layout, shared, subtracted, functions, tuple(calls), stride=8, factor=0.5,
            tables=tuple(lattice_tables(lattice)),
        )  # fmt: skip
    if book is not None and book.float_dtype is not None:
        functions, calls = decode_floats(layout, book.float_dtype, half)
        return WeightForm(spec, half, layout, shared, subtracted, functions, tuple(calls))
    if book is not None and spec.codebook != "ternary":
        return _table_form(spec, half, layout, shared, subtracted, is_scaled(spec, dtype, group))
    if shared is not None and is_scaled(spec, dtype, group):
        functions, calls = decode_scaled(layout, subtracted, shared)
        return WeightForm(
            spec, half, layout, shared, subtracted, functions, tuple(calls), is_scaled=True,
            scale_steps=scale_steps(layout, shared),
        )  # fmt: skip
    functions, calls = decode_integers(layout, spec.bits, half, subtracted, shared or layout.fields)
    return WeightForm(spec, half, layout, shared, subtracted, functions, tuple(calls))


def _table_form(
    spec: WeightSpec, half: Half | None, layout: WordLayout, shared: int | None, subtracted: Subtracted, scaled: bool
) -> WeightForm:
    whole = whole_levels(spec.book.levels) if spec.book else None
    if scaled and shared is not None and whole is not None:
        functions, calls, before = decode_scaled_table(layout, shared)
        return WeightForm(
            spec, half, layout, shared, subtracted, functions, tuple(calls), factor=1 / whole.unit,
            tables=("planes_ptr",), before=tuple(before), is_scaled=True,
        )  # fmt: skip
    functions, calls, before = decode_table(layout, half)
    tables = ("planes_ptr" if half else "levels_ptr",)
    return WeightForm(
        spec, half, layout, shared, subtracted, functions, tuple(calls), tables=tables, before=tuple(before)
    )


def fields_per_scale(layout: WordLayout, group: int) -> int:
    """Fields of a block that lie in one group, wherever the block begins."""
    return gcd(group // layout.rows, layout.fields)


def _subtracted(spec: WeightSpec) -> Subtracted:
    if spec.zero != "none":
        return Subtracted(is_tile=True, has_fractions=spec.zero != "int")
    return Subtracted(1 if spec.codebook == "ternary" else 1 << (spec.bits - 1) if spec.bits <= 8 else 0)
