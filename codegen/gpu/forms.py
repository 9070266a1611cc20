"""Which form a spec takes in kernels on 16-bit words: its layout, the text that decodes it, its scales and zeros.

`form_of` is what the text is made from; `pack_parts` brings stored parts into that form, once per weight. A minimum
becomes a zero in units of codes: scale * code - minimum = scale * (code - minimum / scale). Scales and zeros of whole
rows are float32. In groups they are float16, with a power of two taken out of the scales (of each output, where the
decoder applies them) so that none leaves its range, and lie in pairs in 32-bit words, since nothing narrower is copied
asynchronously:

    for each block (or group, if that is longer)    s_0 s_1 .. z_0 z_1 ..    two to a word    [rows, words, outputs]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc import storage
from ptqc.codegen.gpu.decode import Subtracted, decode_integers
from ptqc.codegen.gpu.lattices import (
    decode_lattice,
    lattice_codes,
    lattice_layout,
    lattice_tables,
    lattice_words,
)
from ptqc.codegen.gpu.levels import byte_planes, decode_floats, decode_table, whole_levels
from ptqc.codegen.gpu.ptx import HALVES, Half
from ptqc.codegen.gpu.scaled import (
    SMALLEST,
    centred_bytes,
    decode_scaled,
    decode_scaled_table,
    is_scaled,
    scale_steps,
)
from ptqc.codegen.gpu.words import WordLayout, pack_words, unpack_words, word_layout
from ptqc.spec import WeightSpec

__all__ = [
    "OUTPUT_STEP",
    "WeightForm",
    "codes_of_words",
    "fields_per_scale",
    "form_of",
    "logical_parts",
    "pack_parts",
    "pack_scales",
    "padded",
    "scales_of",
]

OUTPUT_STEP = 128
"""Outputs are filled up to a multiple of this."""

_FEW_ROWS = 32
"""Rows of a block that has many fields, or many groups: two warps then do with fewer instructions than four."""

_MOST_FIELDS = 4
"""More fields than this do not fit in registers beside sums for many rows."""

_FARTHEST_ZERO = 32768.0
"""A zero farther from the codes than this (in steps) leaves nothing of them in 16 bits."""

_SMALLEST_SCALE = 2.0**-100
"""Outputs whose scales are all smaller are taken for zero, or nearly so."""


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


# -------------------------------------------------------------------- parts


def padded(outputs: int) -> int:
    """Outputs of a weight once it is filled up."""
    return -(-outputs // OUTPUT_STEP) * OUTPUT_STEP


def pack_parts(parts: Sequence[Tensor], form: WeightForm, shape: tuple[int, int], is_interleaved: bool) -> list[Tensor]:
    """The stored parts of a weight of `shape` [out, in] in the form that kernels read, in the order of `pointers`.

    is_interleaved: rows of the two halves take turns, for gates.
    """
    codes, scale, zero = logical_parts(parts, form.spec, shape, is_interleaved)
    outputs = padded(shape[0])
    pack = pack_words if form.stride == 1 else lattice_words
    found = {"w_ptr": pack(codes, form.layout, outputs)} | _tables(form, codes.device)
    found |= pack_scales(scale * form.factor, zero, form, shape[1])
    return [found[name] for name in form.pointers]


def codes_of_words(words: Tensor, form: WeightForm, outputs: Tensor, count: int) -> Tensor:
    """The codes of some outputs, `count` to each: what `pack_parts` has packed."""
    unpack = unpack_words if form.stride == 1 else lattice_codes
    return unpack(words, form.layout, outputs, count)


def logical_parts(
    parts: Sequence[Tensor], spec: WeightSpec, shape: tuple[int, int], is_interleaved: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [out, in // vector] uint8 or int64, scale and zero [out, in // group] float32, the latter in codes."""
    named = dict(zip(storage.part_names(spec), parts, strict=True))
    codes = spec.packer.unpack(named["codes"], spec.bits, shape[1] // spec.vector)
    if codes.dtype not in (torch.uint8, torch.int64):
        codes = codes.view(torch.uint8)
    scale, zero = storage.row_scales(named, spec, shape)
    if is_interleaved:
        order = torch.arange(shape[0], device=codes.device).view(2, -1).T.flatten()
        codes, scale, zero = codes[order], scale[order], None if zero is None else zero[order]
    if spec.zero == "min" and zero is not None:
        return storage.minimum_as_zero(codes, scale, zero, _FARTHEST_ZERO)
    return codes, scale, zero


def pack_scales(scale: Tensor, zero: Tensor | None, form: WeightForm, inputs: int) -> dict[str, Tensor]:
    """Scales and zeros by the names of their pointers."""
    outputs = padded(len(scale))
    if form.fields_per_scale is None:
        zeros = {} if zero is None else {"z_ptr": _transposed(zero, outputs)}
        return {"s_ptr": _transposed(scale, outputs)} | zeros
    words, norm = _scale_words(scale, zero, form, inputs, outputs)
    return {"s_ptr": words, "norm_ptr": norm}


def _transposed(scale: Tensor, outputs: int) -> Tensor:
    return pad(scale, (0, 0, 0, outputs - len(scale))).T.contiguous()


def _scale_words(
    scale: Tensor, zero: Tensor | None, form: WeightForm, inputs: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [out, in // group] as words [rows * words, outputs] int32; what outputs are multiplied by."""
    norm = scale.new_ones(1, 1)
    if form.half is not None:
        # The largest scale goes to 2^14 .. 2^15; no bit of others changes unless they are 2^24 smaller.
        largest = scale.abs().amax(1, keepdim=True) if form.is_scaled else scale.abs().amax().view(1, 1)
        norm = torch.exp2(largest.clamp_min(_SMALLEST_SCALE).log2().floor() - 14)
        scale = (scale / norm).to(torch.float16).float()
    if form.is_scaled:
        zero = None if zero is None else zero * scale * -SMALLEST
        norm = norm / SMALLEST
    rows = -(-inputs // form.inputs_per_row)
    starts = torch.arange(rows * form.scales_per_row, device=scale.device) * (
        form.inputs_per_row // form.scales_per_row
    )
    groups = (starts // (form.spec.group or inputs)).clamp_max(scale.shape[1] - 1)
    numbers = [scale] if zero is None else [scale, zero]
    spread = [number[:, groups].unflatten(1, (rows, form.scales_per_row)) for number in numbers]
    spread[0] = spread[0] * scale.new_tensor(form.scale_steps)
    listed = torch.cat(spread, 2)
    if form.half is None:
        words = listed.view(torch.int32)
    else:
        words = pad(listed, (0, listed.shape[2] % 2)).to(torch.float16).view(torch.int32)
    return _transposed(words.flatten(1), outputs), (_transposed(norm, outputs) if form.is_scaled else norm).flatten()


def scales_of(named: Mapping[str, Tensor], form: WeightForm, inputs: int) -> Tensor:
    """Scales [outputs with padding, in // group] float32 by the names of their pointers: `pack_scales` backwards."""
    words = named["s_ptr"].T.contiguous()
    if form.fields_per_scale is None:
        return words / form.factor
    listed = words.view(torch.float32 if form.half is None else torch.float16)
    rows = listed.unflatten(1, (-(-inputs // form.inputs_per_row), -1))[:, :, : form.scales_per_row]
    rows = (rows.float() / rows.new_tensor(form.scale_steps, dtype=torch.float32)).flatten(1)
    step, group = form.inputs_per_row // form.scales_per_row, form.spec.group or inputs
    firsts = torch.arange(0, inputs, group, device=words.device) // step
    norm = named["norm_ptr"][:, None] * (SMALLEST if form.is_scaled else 1.0)
    scales: Tensor = rows[:, firsts] * norm / form.factor
    return scales


def _tables(form: WeightForm, device: torch.device) -> dict[str, Tensor]:
    book = form.spec.book
    if book is None or not form.tables:
        return {}
    if book.lattice is not None:
        return {name: table.to(device) for name, table in lattice_tables(book.lattice).items()}
    levels = pad(book.table(device), (0, 16 - len(book.levels)))
    if form.half is None:
        return {"levels_ptr": levels}
    whole = whole_levels(book.levels)
    if form.is_scaled and whole is not None:
        return {"planes_ptr": torch.tensor(centred_bytes(whole.levels), device=device)}
    return {"planes_ptr": torch.tensor(byte_planes(book.levels, form.half), device=device)}
